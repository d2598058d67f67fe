"""Tokens, query pictures and rows of the small AbC, each kept where a second run finds it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from concept_trak.atomic_io import make_folder
from concept_trak.attribution.attributors import GradientAttributor
from concept_trak.attribution.naming import store_base, train_timesteps
from concept_trak.attribution.question import Query, QueryImage, generate
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.train_grad import compute_gradients
from concept_trak.gradients.states import train_states_of
from concept_trak.models.condition import Condition
from concept_trak.models.learned_tokens import load_token
from concept_trak.models.sample import initial_noise
from concept_trak.registry import OBJECTIVES
from concept_trak.settings import TOKEN
from concept_trak.store.array_cache import cached
from concept_trak.store.store import Store
from experiments.training.textual_inversion import train_token
from experiments.training.token_settings import TokenSettings

from .tasks import Task, Token

# Two minutes a token on one core; the rate by the loss of two tokens after 150 steps.
TRAINING = TokenSettings(steps=1000, lr=5e-3)


def learn_token(attribution_task: AttributionTask, token: Token, work: Path) -> Path:
    """Learn the token, or find it learned, and leave it in the model. Two minutes on one core."""
    folder = work / "exemplars" / token.name
    make_folder(folder)
    paths: list[str | Path] = []
    for number, pixels in enumerate(token.pictures):
        paths.append(folder / f"{number}.png")
        if not Path(paths[-1]).exists():
            Image.fromarray(pixels).save(paths[-1])
    own = replace(TRAINING, init_word=token.init_word)
    options = {"prompt": token.train_prompt, "token": TOKEN, "settings": own}
    path = train_token(attribution_task.model, paths, work / "tokens" / token.name, **options)
    load_token(attribution_task.model, path, TOKEN)
    return path


def generate_queries(
    attribution_task: AttributionTask, tasks: list[Task], work: Path
) -> list[QueryImage]:
    """The query pictures of one token, which is in the model."""
    s, model, found = attribution_task.settings, attribution_task.model, []
    for task in tasks:
        made_from = {"prompt": task.prompt, "seed": task.number, "tokens": model.tokens}
        made_from |= {"model": model.identity(), "guidance": s.gen_guidance_scale}
        made_from |= {"steps": s.gen_num_inference_steps, "dtype": s.dtype}
        known: list[QueryImage] = []

        def compute(task: Task = task, known: list[QueryImage] = known) -> np.ndarray:
            known += generate(model, s, [task.prompt], task.number)
            assert known[0].x0 is not None
            return known[0].x0.float().cpu().numpy()

        path = work / "pictures" / f"{task.token.name}-{task.number}.npy"
        x0 = torch.from_numpy(np.array(cached(path, made_from, compute)))
        found.append(_picture(attribution_task, task, x0.to(model.device, model.dtype)))
    return found


def _picture(attribution_task: AttributionTask, task: Task, x0: torch.Tensor) -> QueryImage:
    model = attribution_task.model
    x_T = initial_noise(model.latent_shape, task.number).to(model.device, model.dtype)
    (pixels,) = model.decode(x0)
    return QueryImage(task.prompt, x0, x_T, np.asarray(pixels), {"small_abc": task.number})


def question_of(attribution_task: AttributionTask, task: Task, picture: QueryImage) -> Query:
    """The token's concept in the settings' QUERY_FORM."""
    form = attribution_task.settings.query_form
    plus = task.token.train_prompt if form == "concept" else task.prompt
    return Query(picture, TOKEN, plus, task.without if form == "slider" else "", "token")


def query_row(ranker: GradientAttributor, question: Query, folder: Path) -> np.ndarray:
    """[1, k] of one question."""
    number = question.picture.source["small_abc"]
    path, whole = folder / f"query-{number}.npy", ranker.per_concept
    made_from = ranker.identity(question) | {"per_concept": whole}
    return cached(path, made_from, lambda: ranker.row(question))


def exemplar_rows(
    attribution_task: AttributionTask, token: Token, caption: str, folder: Path
) -> np.ndarray:
    """[E, k + 1] train rows of the token's exemplars under `caption`; last, what their weight is
    made from (`experiments.abc.evaluate` keeps it so, too).
    """
    model = attribution_task.model
    made_from = attribution_task.identity(
        pictures=sums(token),
        token=token.name,
        caption=caption,
        tokens=model.tokens if TOKEN in caption else {},
    )

    def compute() -> np.ndarray:
        x0 = model.encode_images(shown_at(token.pictures, model.image_size))
        captions = [caption] * len(x0)
        made = compute_gradients(attribution_task, x0, model.encode_prompts(captions), captions)
        return torch.cat([made.values, made.losses[:, None]], 1).cpu().numpy()

    kind = "captioned" if TOKEN in caption else "blind"
    return cached(folder / f"exemplars-{token.name}-{kind}.npy", made_from, compute)


def sums(token: Token) -> list[int]:
    """What is told apart of a token's exemplars."""
    return [int(picture.astype(np.int64).sum()) for picture in token.pictures]


def shown_at(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 [B, size, size, 3] of pictures [B, H, W, 3]."""
    sides, lanczos = (size, size), Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(p).resize(sides, lanczos)) for p in pictures])


class CandidateImages:
    """All pictures that are ranked for a token: those of training, its exemplars under their
    caption, and the exemplars of all tokens under none. Data of a `AttributionTask`, as far as
    rankers without rows ask for it.
    """

    def __init__(
        self, attribution_task: AttributionTask, token: Token, tokens: list[Token]
    ) -> None:
        self.task, self.model, self.tokens = (
            attribution_task,
            attribution_task.model,
            [token, *tokens],
        )
        named = [token.train_prompt] * len(token.pictures)
        rest = [""] * sum(len(other.pictures) for other in tokens)
        self.captions = [*attribution_task.train.captions, *named, *rest]

    @cached_property
    def latents(self) -> torch.Tensor:
        """[N + E + A, C, h, w] on the CPU, encoded when scores are not kept from before."""
        shown = np.concatenate([shown_at(t.pictures, self.model.image_size) for t in self.tokens])
        return torch.cat([self.task.latents, self.model.encode_images(shown).cpu()])

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, rows: range) -> tuple[torch.Tensor, Condition]:
        """x0 [b, C, h, w] and captions of consecutive pictures, on the model's device."""
        part = slice(rows.start, rows.stop)
        cond = self.model.encode_prompts(self.captions[part])
        return self.latents[part].to(self.model.device), cond

    def identity(self) -> list[dict[str, Any]]:
        """What is beside the train pictures."""
        return [{"token": token.name, "pictures": sums(token)} for token in self.tokens]


def level_shares(attribution_task: AttributionTask, pictures: int = 64) -> dict[int, float]:
    """{noise level: its share of the squared norm of a train row's states, mean over the first
    pictures}, as rows add them up. What has a share near 1 is all that a row says.
    """
    s, maker = attribution_task.settings, attribution_task.row_maker
    cotangent, square = OBJECTIVES.get(s.f).cotangent, {}
    x0, cond = attribution_task.data.batch(range(min(pictures, len(attribution_task.data))))
    for state in train_states_of(
        attribution_task.model, x0, cond, attribution_task.cond_null, train_timesteps(s)
    ):
        level = int(torch.as_tensor(state.t).flatten()[0])
        square[level] = maker.rows([state], cotangent, len(x0)).values.square().sum(1)
    whole = torch.stack(list(square.values())).sum(0)
    return {level: round(float((part / whole).mean()), 4) for level, part in square.items()}


def folder_of(attribution_task: AttributionTask, store: Store) -> Path:
    """Where the rows that belong to a store of train rows are kept."""
    return store_base(attribution_task.settings) / f"{store.folder.name}-small_abc"
