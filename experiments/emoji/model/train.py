"""Train the embedded pipeline from the train split: autoencoder, its decoder once more, cached
latents, text encoder + UNet, saved pipeline.

    L = E w_t || eps - eps_theta(x_t, t, tau_theta(caption)) ||^2
    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,      w_t = min(1 / abar_t, max_weight)

(DDPM, Ho et al. 2020, eq. 14); the text encoder tau is trained along, captions are dropped with
probability `cond_drop`. Everything that chance decides is seeded; every part resumes from
`<work>/{vae,decoder,unet}.safetensors`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from concept_trak.atomic_io import atomic_folder, write_bytes
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import remove_hint
from concept_trak.validated_io import parse_json, read_text
from experiments.training.loop import (
    LrPhase,
    Run,
    phase_of,
    run_training,
    step_generator,
    tensor_hash,
)

from . import pipeline as embedded
from .autoencoder import AutoencoderSettings, jitter, refine_decoder, train_vae

ALPHA_BAR = embedded.build_scheduler().alphas_cumprod


@dataclass(frozen=True)
class TrainSettings(AutoencoderSettings):
    """Hyper-parameters of the embedded model; written next to the weights."""

    unet_phases: tuple[LrPhase, ...] = (
        LrPhase(1000, 4200),
        LrPhase(2250, 2600, max_weight=10.0),
        LrPhase(1000, 20000, max_weight=10.0, peak=0.8),
        LrPhase(750, 5000, max_weight=10.0),
        LrPhase(3000, 3000, max_weight=10.0, peak=0.95),
        LrPhase(2750, 5000, max_weight=10.0, peak=0.8),
        LrPhase(1250, 1250, max_weight=10.0, peak=0.36),
    )
    unet_batch: int = 32
    unet_lr: float = 8e-4
    weight_decay: float = 1e-3
    ema_decay: float = 0.998
    cond_drop: float = 0.10  # captions replaced by "" (Ho & Salimans 2022)
    object_only: float = 0.10  # ... by "a cat": so that a concept alone is a prompt the model knows
    style_only: float = 0.10  # ... by "in the style of blob"
    jitters: int = 8  # cached shifted and scaled versions of each picture
    jitter_share: float = 0.5  # of the draws use one of them; the others the picture as it is
    shift: float = 0.04
    scale: float = 0.05


@dataclass(frozen=True)
class Examples:
    """What the UNet learns from.

    latents: [N, V, C, h, w], version 0 being the picture as it is. tokens: int [N, 4, T], see
    `caption_table`.
    """

    latents: torch.Tensor
    tokens: torch.Tensor


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_latents(
    vae: AutoencoderKL, images: torch.Tensor, settings: TrainSettings
) -> torch.Tensor:
    """[N, 1 + jitters, 16, 8, 8] scaled posterior means: the pictures as they are, then their
    jittered versions.
    """
    streams = [step_generator(settings.seed + 1, j) for j in range(settings.jitters)]
    versions = [images, *(jitter(images, g, settings.shift, settings.scale) for g in streams)]
    factor = vae.config.scaling_factor
    rows = [
        torch.cat([vae.encode(b).latent_dist.mean for b in version.split(64)]) * factor
        for version in tqdm(versions, desc="latents")
    ]
    return torch.stack(rows, 1)


def caption_table(records: list[dict[str, Any]]) -> list[list[str]]:
    """Per picture: full caption, object alone, style alone, empty prompt."""
    return [
        [r["text"], r["object_phrase"], f"in the style of {r['style_phrase']}", ""] for r in records
    ]


def draw_batch(
    examples: Examples, settings: TrainSettings, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch: (x0 [B, C, h, w], token ids [B, T], t [B]); timesteps stratified over the batch
    to calm the loss.
    """
    n, versions = examples.latents.shape[:2]
    batch = settings.unet_batch
    index = torch.randint(n, (batch,), generator=g)
    jittered = torch.rand(batch, generator=g) < settings.jitter_share
    version = torch.randint(1, versions, (batch,), generator=g) * jittered
    u = torch.rand(batch, generator=g)
    o, s, d = settings.object_only, settings.style_only, settings.cond_drop
    kind = (u < o + s + d).long() + (u < s + d).long() + (u < d).long()
    t = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch * 1000).long()
    return examples.latents[index, version], examples.tokens[index, kind], t


def unet_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    examples: Examples,
    settings: TrainSettings,
    step: int,
) -> torch.Tensor:
    """The module docstring's loss on the batch of one step, drawn from (seed, step)."""
    g = step_generator(settings.seed + 2, step)
    x0, ids, t = draw_batch(examples, settings, g)
    eps = torch.randn(x0.shape, generator=g)
    a = ALPHA_BAR[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    eps_hat = unet(x_t, t, text_encoder(ids).last_hidden_state).sample
    # 1 / abar turns the eps error towards the v error: at high noise, where the caption decides,
    # eps alone weighs little.
    weight = (1 / a).clamp(max=phase_of(step, settings.unet_phases)[0].max_weight)
    return (weight * (eps_hat - eps).square()).mean()


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    examples: Examples,
    settings: TrainSettings,
    work: Path,
    encoder: str = "",
) -> None:
    """Train UNet and text encoder together; leaves the averaged weights in both.

    Goes on from work / unet.safetensors. encoder: fingerprint of what encoded the latents.
    """
    unet.to(memory_format=torch.channels_last)
    parts = {"unet": unet, "text": text_encoder}
    params = {f"{part}.{k}": p for part, net in parts.items() for k, p in net.named_parameters()}
    inputs = {"captions": tensor_hash([examples.tokens]), "encoder": encoder}
    run = Run(
        work / "unet.safetensors",
        settings.unet_phases,
        settings.unet_lr,
        warmup=200,
        ema_decay=settings.ema_decay,
        save_every=250,
        weight_decay=settings.weight_decay,
        desc="unet",
        made_from=settings.without("decoder_") | inputs,
    )
    loss = functools.partial(unet_loss, unet, text_encoder, examples, settings)
    run_training(params, loss, run).copy_to(params)


def kept_tokenizer(folder: Path, captions: list[str]) -> CLIPTokenizer:
    """The tokenizer of this run: learned once and kept, since a checkpoint's embeddings mean
    nothing under other token numbers.
    """
    if not (folder / "tokenizer.json").exists():
        with atomic_folder(folder) as made:
            embedded.build_tokenizer(captions).save_pretrained(made)
    return CLIPTokenizer.from_pretrained(folder)


def train(dataset: ImageCaptionDataset, folder: Path, work: Path, settings: TrainSettings) -> None:
    """Train everything from the train split of `dataset`; `folder` receives the pipeline, its
    settings and loss curves. UserError for a checkpoint in `work` that another run made.
    """
    work.mkdir(parents=True, exist_ok=True)
    rows = dataset.split("train")
    images = to_tensor(rows.images(range(len(rows)), size=embedded.IMAGE_SIZE))
    vae = train_vae(images, settings, work)
    encoder = tensor_hash(vae.encoder.parameters())
    refine_decoder(vae, images, settings, work)
    captions = sum(caption_table(rows.records), [])
    tokenizer = kept_tokenizer(work / "tokenizer", captions)
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(settings.seed)
    text_encoder, unet = embedded.build_text_encoder(tokenizer), embedded.build_unet()
    latents = encode_latents(vae, images, settings)
    examples = Examples(latents, ids.view(len(rows), 4, -1))
    train_unet(unet, text_encoder, examples, settings, work, encoder)
    pipe = embedded.build_pipeline(vae, text_encoder, tokenizer, unet)
    curves = {name: loss_curve(work / f"{name}.jsonl") for name in ("vae", "decoder", "unet")}
    steps = sum(phase.steps for phase in settings.unet_phases)
    facts = {"settings": asdict(settings), "steps": steps, "curves": curves}
    with atomic_folder(folder) as made:
        embedded.save_pipeline(pipe, made)
        write_bytes(made / "training.json", json.dumps(facts, indent=0).encode())


def loss_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a training's log; none of a training too short to have one."""
    if not path.stat().st_size:
        return []
    mend = remove_hint(path.parent)  # of no use without its checkpoint
    lines = read_text(path, mend).splitlines()
    return [parse_json(line, path, mend, dict) for line in lines]
