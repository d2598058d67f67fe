"""Textual Inversion (Gal et al. 2023, arXiv:2208.01618): a word v for what a few pictures show,
learned with every weight frozen.

    v*  = argmin_v  E_{x0, eps, t} || y - f_theta(x_t, t, tau(prompt with v)) ||^2
    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps

where the network f predicts y = eps or y = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (v-prediction).
So theta stays the base model's, and so do its train gradients; only prompts that hold the token
change. Results are {token: [d]} as safetensors with a JSON record beside it.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from concept_trak.atomic_io import disk_errors, sha256_file, write_json
from concept_trak.datasets.image_folder import ImageCaptionDataset, read_images
from concept_trak.errors import UserError, remove_hint
from concept_trak.models.condition import Condition
from concept_trak.models.learned_tokens import load_token
from concept_trak.models.schedule import NUM_TRAIN_TIMESTEPS
from concept_trak.models.text_to_image import TextToImage
from concept_trak.settings import TOKEN, provenance
from concept_trak.validated_io import read_json, refuse_misfits

from .loop import (
    MOMENTS,
    check_same_run,
    load_checkpoint,
    running_mean,
    save_checkpoint,
    step_generator,
)
from .token_settings import PROMPT, TokenSettings

SAVE_EVERY = 100  # steps between checkpoints; a killed run repeats the steps since the last


@dataclass(frozen=True)
class InversionBatch:
    """What a token is learned from: latents as of `encode`; ids int [1, T], the prompt's tokens."""

    model: TextToImage
    latents: torch.Tensor
    ids: torch.Tensor
    settings: TokenSettings


def other_folder(path: Path) -> str:
    """What to do about a file of another run."""
    return f"give another --out-dir, or {remove_hint(path)}"


def initial_embedding(model: TextToImage, word: str) -> tuple[torch.Tensor, str]:
    """(embedding [d], the token it is of): the first token of a word or phrase, as the method asks
    for one. UserError for none.
    """
    tokenizer, table = model.pipe.tokenizer, model.pipe.text_encoder.get_input_embeddings()
    numbers = tokenizer(word, add_special_tokens=False).input_ids
    if not numbers:
        raise UserError(
            f"--init-word={word!r} has no token; give --init-word one that describes the pictures"
        )
    row = table.weight[numbers[0]].detach().float().cpu().clone()
    return row, tokenizer.convert_ids_to_tokens(numbers[0])


def init_word_of(prompt: str, token: str) -> str:
    """What follows the token: "<new1> golden retriever" -> "golden retriever"; "art" when nothing
    does.
    """
    return prompt.rpartition(token)[2].strip(" .,") or "art"


@contextlib.contextmanager
def with_token_embedding(model: TextToImage, number: int, row: torch.Tensor) -> Iterator[None]:
    """Let the text encoder read `row` [d], with its graph, for token `number`: the table itself,
    like every weight, is not touched.
    """

    def swap(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == number)[..., None], row.to(output.dtype), output)

    handle = model.pipe.text_encoder.get_input_embeddings().register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def encode(model: TextToImage, data: ImageCaptionDataset, flip: bool) -> torch.Tensor:
    """[N, 1 or 2, C, h, w] float32 scaled latents on the CPU: each picture, and its mirror image if
    `flip`.
    """
    latents = []
    for index in range(len(data)):
        image = data.images([index], size=model.image_size)
        versions = (image, image[:, :, ::-1]) if flip else (image,)
        latents.append(torch.cat([model.encode_images(x).float().cpu() for x in versions]))
    return torch.stack(latents)


def token_loss(lesson: InversionBatch, step: int) -> torch.Tensor:
    """The loss of the module docstring on the batch of one step, drawn on the CPU from (seed,
    step).
    """
    model, latents, batch = lesson.model, lesson.latents, (lesson.settings.batch_size,)
    g = step_generator(lesson.settings.seed, step)
    picture = torch.randint(len(latents), batch, generator=g)
    x0 = latents[picture, torch.randint(latents.shape[1], batch, generator=g)]
    t = torch.randint(NUM_TRAIN_TIMESTEPS, batch, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    a = model.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    is_eps = model.schedule.prediction == "epsilon"
    target = eps if is_eps else a.sqrt() * eps - (1 - a).sqrt() * x0
    embeddings = model.pipe.text_encoder(lesson.ids)[0].to(model.dtype)
    cond = Condition(embeddings).expand(len(x0))
    out = model.output(x_t.to(model.device, model.dtype), t.to(model.device), cond)
    return (out.float() - target.to(model.device)).square().mean()


def fit(
    lesson: InversionBatch,
    number: int,
    start: torch.Tensor,
    checkpoint: Path,
    identity: dict[str, Any],
) -> tuple[torch.Tensor, float]:
    """AdamW on the row [d] of token `number`; returns it and the running mean of its loss. Goes on
    from `checkpoint` if that is of the same identity.

    UserError when the checkpoint is of another run, or the loss is not finite.
    """
    settings, device, first, mean = lesson.settings, lesson.model.device, 0, None
    row = start.to(device, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([row], lr=settings.lr, weight_decay=settings.weight_decay)
    if checkpoint.exists():
        tensors, state = load_checkpoint(checkpoint)
        check_same_run(identity, state.get("identity") or {}, checkpoint, other_folder(checkpoint))
        like = dict.fromkeys(("row", *MOMENTS), start)
        refuse_misfits(tensors, like, checkpoint, remove_hint(checkpoint))
        first, mean, row.data = state["step"], state["mean"], tensors.pop("row").to(device)
        moments = {k: v.to(device) for k, v in tensors.items()}
        optimizer.state[row] = moments | {"step": torch.tensor(float(first))}
    steps = range(first, settings.steps)
    bar = tqdm(steps, desc="token", initial=first, total=settings.steps, unit="step")
    with with_token_embedding(lesson.model, number, row), torch.enable_grad():
        for step in bar:
            loss = token_loss(lesson, step)
            value = loss.item()
            if not math.isfinite(value):
                remedy = f"give a lower --learning-rate: rm {shlex.quote(str(checkpoint))}"
                raise UserError(f"the token's loss is {value} at step {step}; {remedy}")
            (row.grad,) = torch.autograd.grad(loss, [row])
            optimizer.step()
            mean = running_mean(mean, value)
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0:
                kept = {k: optimizer.state[row][k] for k in MOMENTS} | {"row": row}
                state = {"step": step + 1, "mean": mean, "identity": identity}
                save_checkpoint(checkpoint, kept, state)
    return row.detach().cpu(), mean


def train_token(
    model: TextToImage,
    images: list[str | Path],
    out_dir: str | Path,
    *,
    prompt: str = "",
    token: str = TOKEN,
    settings: TokenSettings | None = None,
) -> Path:
    """Learn `token` from a folder or list of pictures and leave it in `model`; returns the path of
    its safetensors file.

    prompt must hold the token (default "A picture in the style of <new1> art"). A killed run goes
    on from its checkpoint to the same bytes; a finished one of the same inputs is only loaded.
    UserError when the inputs do not fit or `out_dir` holds another run's.
    """
    settings, prompt = settings or TokenSettings(), prompt or PROMPT.format(token)
    stem = stem_of(token, prompt)
    if model.dtype == torch.float16:
        raise UserError(
            "a token's gradient is lost in DTYPE=fp16; set DTYPE to fp32 or bf16, the token can "
            "be used with any"
        )
    path, data = Path(out_dir) / f"{stem}.safetensors", read_images(images, prompt)
    start, start_token = initial_embedding(model, settings.init_word or init_word_of(prompt, token))
    made_from = {"token": token, "prompt": prompt, "init_token": start_token}
    made_from |= {"pictures": data.content_hash(), "model": model.identity()}
    identity = asdict(settings) | made_from | {"dtype": str(model.dtype)}
    checkpoint = path.with_name(f"{stem}.checkpoint.safetensors")
    if is_finished(path, identity):
        checkpoint.unlink(missing_ok=True)
        load_token(model, path, token)
        return path
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    number = model.add_token(token, start)
    ids = prompt_ids(model, prompt, number)
    lesson = InversionBatch(model, encode(model, data, settings.random_flip), ids, settings)
    row, loss = fit(lesson, number, start, checkpoint, identity)
    model.add_token(token, row)
    save_checkpoint(path, {token: row}, {"token": token, "prompt": prompt})
    record = {"identity": identity, "sha256": sha256_file(path), "loss": loss, "images": len(data)}
    write_json(path.with_suffix(".json"), record | {"provenance": provenance()})
    checkpoint.unlink(missing_ok=True)
    return path


def stem_of(token: str, prompt: str) -> str:
    """The token's file name without suffix. UserError when it is no word, or not in the prompt."""
    stem = re.sub(r"\W", "", token)
    if not stem or re.search(r"\s", token) or token not in prompt:
        raise UserError(
            f"the prompt {prompt!r} must hold the token {token!r}, and a token is one word such "
            f"as {TOKEN}"
        )
    return stem


def is_finished(path: Path, identity: dict[str, Any]) -> bool:
    """Whether `path` is complete. UserError when it is, but of another run."""
    record = path.with_suffix(".json")
    if not (path.exists() and record.exists()):
        return False
    facts = read_json(record, remove_hint(record, "train the token again"))
    if facts.get("sha256") != sha256_file(path):
        return False
    known = facts.get("identity")
    check_same_run(identity, known if isinstance(known, dict) else {}, path, other_folder(path))
    return True


def prompt_ids(model: TextToImage, prompt: str, number: int) -> torch.Tensor:
    """int [1, T] tokens of a prompt. UserError when token `number` is not among them."""
    ids = model.pipe.tokenizer(
        [prompt], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids.to(model.device)
    if number not in ids:
        token = model.pipe.tokenizer.convert_ids_to_tokens(number)
        reason = f"lies beyond the {ids.shape[1]} tokens of a prompt; shorten --prompt"
        raise UserError(f"the token {token} {reason}")
    return ids
