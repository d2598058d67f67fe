"""Train one subset's small model: seeded, resumable, on one thread.

    L = E w_t || eps - eps_theta(x_t, t, tau_theta(caption)) ||^2,   w_t = min(1 / abar_t, bound)

as the embedded model (`experiments.emoji.model.train`). Chance is shared between subsets as far as
can
be: step s of a seed gives every picture a key, and draw b takes the picture with the largest key
among those that are kept, with the same noise, level and kind of caption. So two models of one
seed differ by what was removed, and by little else.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from concept_trak.atomic_io import make_folder
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import TextToImage
from concept_trak.settings import short_hash
from experiments.emoji.model.pipeline import build_scheduler
from experiments.training.loop import (
    LrPhase,
    Run,
    load_averages,
    run_training,
    step_generator,
    tensor_hash,
)

from .small_model import SmallSettings, build, frozen, parameters
from .subsets import Subset, texts_of

ALPHA_BAR = build_scheduler().alphas_cumprod
LASTS = "train it (some six minutes on one core)"
SAVE_EVERY = 400  # steps


@dataclass(frozen=True)
class Examples:
    """latents: [N, C, h, w]. tokens: int [N, 4, T]: full caption, object, style, empty prompt.
    kept: bool [N], what may be drawn.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    kept: torch.Tensor


def examples_of(
    model: TextToImage, data: ImageCaptionDataset, latents: torch.Tensor, subset: Subset
) -> Examples:
    """What the subset teaches; latents [N, C, h, w] of all pictures of `data`."""
    prompts = [text for told in texts_of(data, subset) for text in (*told, "")]
    tokens = model.pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    kept = torch.from_numpy(subset.kept(len(data)))
    return Examples(latents, tokens.view(len(data), 4, -1), kept)


def draw(
    examples: Examples, settings: SmallSettings, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch: (x0 [B, C, h, w], token ids [B, T], t [B], eps [B, C, h, w])."""
    s, g = settings, step_generator(seed, step)
    index = _taken(examples, s, g)
    u = torch.rand(s.batch, generator=g)
    empty, style, some = s.empty_share, s.style_share, s.object_share
    kind = (u < some + style + empty).long() + (u < style + empty).long() + (u < empty).long()
    # stratified over the batch, to calm the loss
    t = ((torch.arange(s.batch) + torch.rand(s.batch, generator=g)) / s.batch * 1000).long()
    x0 = examples.latents[index]
    return x0, examples.tokens[index, kind], t, torch.randn(x0.shape, generator=g)


def _taken(examples: Examples, settings: SmallSettings, g: torch.Generator) -> torch.Tensor:
    keys = torch.rand(settings.batch, len(examples.kept), generator=g)
    return keys.masked_fill(~examples.kept, -1).argmax(1)


def taken(examples: Examples, settings: SmallSettings, seed: int, step: int) -> torch.Tensor:
    """[B] which pictures a step's batch shows; see `draw`."""
    return _taken(examples, settings, step_generator(seed, step))


def loss_of_step(
    model: TextToImage, examples: Examples, settings: SmallSettings, seed: int, step: int
) -> torch.Tensor:
    """The module docstring's loss, a scalar; the network's products in bfloat16."""
    x0, ids, t, eps = draw(examples, settings, seed, step)
    a = ALPHA_BAR[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    unet, encoder, device = model.network, model.pipe.text_encoder, model.device
    with torch.autocast(device.type, torch.bfloat16):
        states = encoder(ids.to(device)).last_hidden_state
        eps_hat = unet(x_t.to(device), t.to(device), states).sample
    weight = (1 / a).clamp(max=settings.max_weight).to(device)
    return (weight * (eps_hat.float() - eps.to(device)).square()).mean()


def identity(
    like: TextToImage, data: ImageCaptionDataset, subset: Subset, settings: SmallSettings
) -> dict[str, Any]:
    """Everything that decides a subset's model, JSON."""
    taught = [subset.kept(len(data)).tolist(), texts_of(data, subset)]
    return {
        "settings": json.loads(json.dumps(asdict(settings))),  # as a checkpoint gives it back
        "seed": subset.seed,
        "data": data.content_hash(),
        "taught": short_hash(taught),
        "encoder": tensor_hash(like.pipe.vae.encoder.parameters()),
    }


def folder_of(work: Path, subset: Subset, made_from: dict[str, Any]) -> Path:
    """Where a subset's checkpoint lies below TRUTH_DIR."""
    return work / f"{subset.name}-{short_hash(made_from)}"


def trained(
    like: TextToImage,
    data: ImageCaptionDataset,
    subset: Subset,
    settings: SmallSettings,
    work: Path,
    line: str,
) -> TextToImage:
    """The finished model of a subset from its checkpoint. UserError, which ends in the line that
    trains it, when there is none, and for one of another subset, seed or settings.
    """
    run, model = run_of(like, data, subset, settings, work), build(like, settings, subset.seed)
    if not run.checkpoint.exists():
        raise UserError(f"no model of {subset.name} in {work}; {LASTS}: {line}")
    if not load_averages(run, parameters(model)):
        raise UserError(f"{run.checkpoint} is not finished; {LASTS}: {line}")
    return frozen(model)


def train_subset(
    like: TextToImage,
    data: ImageCaptionDataset,
    latents: torch.Tensor,
    subset: Subset,
    settings: SmallSettings,
    work: Path,
) -> TextToImage:
    """The small model of a subset, with its averaged weights; goes on from its checkpoint.

    UserError for a checkpoint of something else, a full disk; FloatingPointError on a loss that is
    not finite.
    """
    run, model = run_of(like, data, subset, settings, work), build(like, settings, subset.seed)
    params, examples = parameters(model), examples_of(like, data, latents, subset)
    make_folder(run.checkpoint.parent)
    loss = functools.partial(loss_of_step, model, examples, settings, subset.seed)
    run_training(params, loss, run).copy_to(params)
    return frozen(model)


def run_of(
    like: TextToImage,
    data: ImageCaptionDataset,
    subset: Subset,
    settings: SmallSettings,
    work: Path,
) -> Run:
    """How a subset's model is trained, and where its checkpoint lies."""
    made_from = identity(like, data, subset, settings)
    return Run(
        folder_of(work, subset, made_from) / "model.safetensors",
        (LrPhase(settings.steps, settings.steps),),
        settings.lr,
        settings.warmup,
        settings.ema_decay,
        SAVE_EVERY,
        weight_decay=settings.weight_decay,
        desc=subset.name,
        made_from=made_from,
    )
