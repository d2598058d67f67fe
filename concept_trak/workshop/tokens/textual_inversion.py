"""Textual Inversion (Gal et al. 2023, arXiv:2208.01618): a word v for what a few pictures show,
learned with every weight frozen.

    v* = argmin_v  E_{x0, eps, t} || y - f_theta(x_t, t, tau(prompt with v)) ||^2,      x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps

where the network f predicts y = eps or y = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (v-prediction).
So theta stays the base model's, and so do its train gradients; only prompts that hold the token
change. Results are {token: [d]} as safetensors with a JSON record beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from ...datasets.folder import ImageCaptionDataset, pictures
from ...errors import UserError
from ...files import disk_errors, sha256_file, write_json
from ...models.ddim import NUM_TRAIN_TIMESTEPS
from ...models.text_to_image import TextToImage
from ...models.tokens import load_token
from ...settings import TOKEN, provenance
from ..training import load_checkpoint, save_checkpoint, step_generator
from .settings import PROMPT, TokenSettings

SAVE_EVERY = 100  # steps between checkpoints; a killed run repeats the steps since the last


def initial_embedding(model: TextToImage, word: str) -> tuple[torch.Tensor, str]:
    """(embedding [d], the token it is of): the first token of a word or phrase, as the method asks
    for one. UserError for none.
    """
    numbers = model.pipe.tokenizer(word, add_special_tokens=False).input_ids
    if not numbers:
        raise UserError(
            f"--init-word={word!r} has no token; give a word that describes the pictures"
        )
    table = model.pipe.text_encoder.get_input_embeddings().weight
    return table[
        numbers[0]
    ].detach().float().cpu().clone(), model.pipe.tokenizer.convert_ids_to_tokens(numbers[0])


def init_word_of(prompt: str, token: str) -> str:
    """What follows the token: "<new1> golden retriever" -> "golden retriever"; "art" when nothing
    does.
    """
    return prompt.rpartition(token)[2].strip(" .,") or "art"


@contextlib.contextmanager
def row_in_use(model: TextToImage, number: int, row: torch.Tensor):
    """Let the text encoder read `row` [d], with its graph, for token `number`: the table itself,
    like every weight, is not touched.
    """

    def swap(module, args, output):
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
    versions = []
    for index in range(len(data)):
        image = data.images([index], size=model.image_size)
        versions.append(
            torch.cat(
                [
                    model.encode_images(x).float().cpu()
                    for x in ((image, image[:, :, ::-1]) if flip else (image,))
                ]
            )
        )
    return torch.stack(versions)


def token_loss(
    model: TextToImage, latents: torch.Tensor, ids: torch.Tensor, settings: TokenSettings, step: int
) -> torch.Tensor:
    """The loss of the module docstring on the batch of one step, drawn on the CPU from (seed,
    step); latents as of `encode`, ids [1, T].
    """
    g, batch = step_generator(settings.seed, step), (settings.batch_size,)
    x0 = latents[
        torch.randint(len(latents), batch, generator=g),
        torch.randint(latents.shape[1], batch, generator=g),
    ]
    t = torch.randint(NUM_TRAIN_TIMESTEPS, batch, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    a = model.alpha_bar[t].float().view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    target = eps if model.prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0
    cond = model.pipe.text_encoder(ids)[0].to(model.dtype)
    out = model.output(
        x_t.to(model.device, model.dtype), t.to(model.device), cond.expand(len(x0), -1, -1)
    )
    return (out.float() - target.to(model.device)).square().mean()


def fit(
    model: TextToImage,
    latents: torch.Tensor,
    ids: torch.Tensor,
    number: int,
    start: torch.Tensor,
    settings: TokenSettings,
    checkpoint: Path,
    identity: dict,
) -> tuple[torch.Tensor, float]:
    """AdamW on one row [d]; returns it and the running mean of its loss. Goes on from `checkpoint`
    if that is of the same identity.

    UserError when the checkpoint is of another run, or the loss is not finite.
    """
    row = start.to(model.device, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([row], lr=settings.lr, weight_decay=settings.weight_decay)
    first, mean = 0, None
    if checkpoint.exists():
        tensors, state = checkpoint_of(identity, checkpoint)
        first, mean, row.data = state["step"], state["mean"], tensors.pop("row").to(model.device)
        optimizer.state[row] = {k: v.to(model.device) for k, v in tensors.items()} | {
            "step": torch.tensor(float(first))
        }
    with row_in_use(model, number, row), torch.enable_grad():
        for step in (
            bar := tqdm(
                range(first, settings.steps),
                initial=first,
                total=settings.steps,
                desc="token",
                unit="step",
            )
        ):
            loss = token_loss(model, latents, ids, settings, step)
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(
                    f"the token's loss is {value} at step {step}; lower --learning-rate and "
                    f"remove {checkpoint}"
                )
            (row.grad,) = torch.autograd.grad(loss, [row])
            optimizer.step()
            mean = value if mean is None else 0.98 * mean + 0.02 * value
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0:
                kept = {k: optimizer.state[row][k] for k in ("exp_avg", "exp_avg_sq")} | {
                    "row": row
                }
                with disk_errors(checkpoint):
                    save_checkpoint(
                        checkpoint, kept, {"step": step + 1, "mean": mean, "identity": identity}
                    )
    return row.detach().cpu(), mean


def checkpoint_of(identity: dict, path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """`load_checkpoint` for this run. UserError when it is damaged or of another run."""
    try:
        tensors, state = load_checkpoint(path)
        found = state["identity"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {path} is damaged ({error}); remove it and train again"
        ) from None
    refuse_other(identity, found, path)
    return tensors, state


def refuse_other(wanted: dict, found: dict, path: Path) -> None:
    """UserError naming what differs when `path` was made from something else."""
    if different := sorted(
        k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)
    ):
        raise UserError(
            f"{path} was made from another {', '.join(different)}; give another --out-dir or "
            "remove it"
        )


def train_token(
    model: TextToImage,
    images: list[str | Path],
    out_dir: str | Path,
    *,
    prompt: str = "",
    token: str = TOKEN,
    settings: TokenSettings = TokenSettings(),
) -> Path:
    """Learn `token` from a folder or list of pictures and leave it in `model`; returns the path of
    its safetensors file.

    prompt must hold the token (default "A picture in the style of <new1> art"). A killed run goes
    on from its checkpoint to the same bytes; a finished one of the same inputs is only loaded.
    UserError when the inputs do not fit or `out_dir` holds another run's.
    """
    prompt, stem = prompt or PROMPT.format(token), re.sub(r"\W", "", token)
    if not stem or re.search(r"\s", token) or token not in prompt:
        raise UserError(
            f"the prompt {prompt!r} must hold the token {token!r}, and a token is one word such "
            f"as {TOKEN}"
        )
    if model.dtype == torch.float16:
        raise UserError(
            "a token's gradient is lost in DTYPE=fp16; train it with fp32 or bf16, it can be used "
            "with any"
        )
    path, data = Path(out_dir) / f"{stem}.safetensors", pictures(images, prompt)
    start, start_token = initial_embedding(model, settings.init_word or init_word_of(prompt, token))
    identity = asdict(settings) | {
        "token": token,
        "prompt": prompt,
        "init_token": start_token,
        "pictures": data.content_hash(),
        "model": model.weight_hash(),
        "dtype": str(model.dtype),
    }
    record = path.with_suffix(".json")
    if (
        path.exists()
        and record.exists()
        and json.loads(record.read_text())["sha256"] == sha256_file(path)
    ):
        refuse_other(identity, json.loads(record.read_text())["identity"], path)
        load_token(model, path, token)
        return path
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    number = model.add_token(token, start)
    ids = model.pipe.tokenizer(
        [prompt], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids.to(model.device)
    if number not in ids:
        raise UserError(
            f"the token {token} lies beyond the {ids.shape[1]} tokens of a prompt; shorten the "
            "prompt"
        )
    checkpoint = path.with_name(f"{stem}.checkpoint.safetensors")
    row, loss = fit(
        model,
        encode(model, data, settings.random_flip),
        ids,
        number,
        start,
        settings,
        checkpoint,
        identity,
    )
    model.add_token(token, row)
    with disk_errors(path):
        save_checkpoint(path, {token: row}, {"token": token, "prompt": prompt})
    write_json(
        record,
        {
            "identity": identity,
            "sha256": sha256_file(path),
            "loss": loss,
            "images": len(data),
            "provenance": provenance(),
        },
    )
    checkpoint.unlink(missing_ok=True)
    return path
