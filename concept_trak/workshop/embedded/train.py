"""Train the embedded pipeline from the train split: autoencoder, its decoder once more, cached
latents, text encoder + UNet, saved pipeline.

Everything that chance decides is seeded; every phase resumes from
`<work>/{vae,decoder,unet}.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..training import (
    Ema,
    Phase,
    jitter,
    phase_of,
    picture_loss,
    run_training,
    step_generator,
    vae_loss,
)
from . import pipeline as embedded


@dataclass(frozen=True)
class TrainSettings:
    """Hyper-parameters of the embedded model; written next to the weights."""

    seed: int = 0
    vae_phases: tuple[Phase, ...] = (
        Phase(1500, 1500),
        Phase(900, 900),
        Phase(6000, 6000, peak=0.6),
    )
    vae_batch: int = 8
    vae_lr: float = 2e-3
    kl_weight: float = 2e-4
    edge_weight: float = 0.5
    vae_shift: float = 0.06
    vae_scale: float = 0.08
    decoder_phases: tuple[Phase, ...] = (Phase(1600, 4000), Phase(1200, 1200, peak=0.65))
    decoder_batch: int = 16
    decoder_lr: float = 1.5e-3
    # added to the latents, in their own standard deviations: the UNet's are not exact either
    decoder_noise: float = 0.03
    unet_phases: tuple[Phase, ...] = (
        Phase(1000, 4200),
        Phase(2250, 2600, max_weight=10.0),
        Phase(1000, 20000, max_weight=10.0, peak=0.8),
        Phase(750, 5000, max_weight=10.0),
        Phase(3000, 3000, max_weight=10.0, peak=0.95),
        Phase(2750, 5000, max_weight=10.0, peak=0.8),
        Phase(1250, 1250, max_weight=10.0, peak=0.36),
    )
    unet_batch: int = 32
    unet_lr: float = 8e-4
    weight_decay: float = 1e-3
    ema_decay: float = 0.998
    cond_drop: float = (
        0.10  # captions replaced by "" (classifier-free guidance, Ho & Salimans 2022)
    )
    object_only: float = 0.10  # ... by "a cat": so that a concept alone is a prompt the model knows
    style_only: float = 0.10  # ... by "in the style of blob"
    jitters: int = 8  # cached shifted and scaled versions of each picture
    jitter_share: float = (
        0.5  # share of the draws that use one of them, against the picture as it is
    )
    shift: float = 0.04
    scale: float = 0.05


def to_tensor(images) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(images: torch.Tensor, settings: TrainSettings, work: Path):
    """Autoencoder with EMA weights and its latent scale set so that latents have unit variance."""
    torch.manual_seed(settings.seed)
    vae = embedded.build_vae()

    def loss(step):
        g = step_generator(settings.seed, step)
        batch = images[torch.randint(len(images), (settings.vae_batch,), generator=g)]
        return vae_loss(
            vae,
            jitter(batch, g, settings.vae_shift, settings.vae_scale, 0.5),
            g,
            settings.kl_weight,
            settings.edge_weight,
        )

    params = dict(vae.named_parameters())
    ema, _ = run_training(
        params,
        loss,
        phases=settings.vae_phases,
        lr=settings.vae_lr,
        warmup=100,
        weight_decay=0.0,
        ema_decay=0.995,
        checkpoint=work / "vae.safetensors",
        save_every=200,
        desc="autoencoder",
        log=work / "vae.jsonl",
    )
    load_ema(params, ema)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        scale = torch.cat([vae.encode(b).latent_dist.mean for b in images.split(64)]).std().item()
    vae.register_to_config(scaling_factor=1 / scale)
    return vae


def refine_decoder(vae, images: torch.Tensor, settings: TrainSettings, work: Path) -> None:
    """Train the decoder on with the encoder frozen: the latents, and so the UNet, stay as they are
    while pictures get sharper.
    """
    decoder = {
        k: p for k, p in vae.named_parameters() if k.startswith(("decoder.", "post_quant_conv."))
    }
    noise = settings.decoder_noise / vae.config.scaling_factor

    def loss(step):
        g = step_generator(settings.seed + 3, step)
        batch = images[torch.randint(len(images), (settings.decoder_batch,), generator=g)]
        batch = jitter(batch, g, settings.vae_shift, settings.vae_scale, 0.5)
        with torch.no_grad():
            z = vae.encode(batch).latent_dist.mean
        return picture_loss(
            vae.decode(z + noise * torch.randn(z.shape, generator=g)).sample,
            batch,
            settings.edge_weight,
        )

    for p in decoder.values():
        p.requires_grad_(True)
    ema, _ = run_training(
        decoder,
        loss,
        phases=settings.decoder_phases,
        lr=settings.decoder_lr,
        warmup=100,
        weight_decay=0.0,
        ema_decay=0.995,
        checkpoint=work / "decoder.safetensors",
        save_every=200,
        desc="decoder",
        log=work / "decoder.jsonl",
    )
    load_ema(decoder, ema)
    vae.requires_grad_(False)


def load_ema(params: dict[str, torch.nn.Parameter], ema: Ema) -> None:
    """Copy the averaged weights into the parameters."""
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(ema.shadow[name])


@torch.no_grad()
def encode_latents(vae, images: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
    """[N, 1 + jitters, 16, 8, 8] scaled posterior means: the pictures as they are, then their
    jittered versions.
    """
    versions = [images]
    for j in range(settings.jitters):
        versions.append(
            jitter(images, step_generator(settings.seed + 1, j), settings.shift, settings.scale)
        )
    factor = vae.config.scaling_factor
    rows = [
        torch.cat([vae.encode(b).latent_dist.mean for b in v.split(64)]) * factor
        for v in tqdm(versions, desc="latents")
    ]
    return torch.stack(rows, 1)


def caption_table(records: list[dict]) -> list[list[str]]:
    """Per picture: full caption, object alone, style alone, empty prompt."""
    return [
        [r["text"], r["object_phrase"], f"in the style of {r['style_phrase']}", ""] for r in records
    ]


def draw_batch(
    latents: torch.Tensor, tokens: torch.Tensor, settings: TrainSettings, g: torch.Generator
):
    """One batch: (x0 [B, 16, 8, 8], token ids [B, T], t [B]); timesteps stratified over the batch
    to calm the loss.
    """
    n, versions = latents.shape[:2]
    batch = settings.unet_batch
    index = torch.randint(n, (batch,), generator=g)
    jittered = torch.rand(batch, generator=g) < settings.jitter_share
    version = torch.where(
        jittered,
        torch.randint(1, versions, (batch,), generator=g),
        torch.zeros(batch, dtype=torch.long),
    )
    u = torch.rand(batch, generator=g)
    o, s, d = settings.object_only, settings.style_only, settings.cond_drop
    kind = (u < o + s + d).long() + (u < s + d).long() + (u < d).long()
    t = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch * 1000).long()
    return latents[index, version], tokens[index, kind], t


def train_unet(
    latents: torch.Tensor,
    tokens: torch.Tensor,
    text_encoder,
    unet,
    settings: TrainSettings,
    work: Path,
    max_minutes=None,
) -> int:
    """DDPM eps-matching of UNet and text encoder together; leaves the EMA weights in both. Returns
    the steps done.
    """
    abar = embedded.build_scheduler().alphas_cumprod
    unet.to(memory_format=torch.channels_last)

    def loss(step):
        g = step_generator(settings.seed + 2, step)
        x0, ids, t = draw_batch(latents, tokens, settings, g)
        eps = torch.randn(x0.shape, generator=g)
        a = abar[t].view(-1, 1, 1, 1)
        eps_hat = unet(
            a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text_encoder(ids).last_hidden_state
        ).sample
        # 1 / abar turns the eps error towards the v error: at high noise, where the caption
        # decides, eps alone weighs little.
        weight = (1 / a).clamp(max=phase_of(step, settings.unet_phases)[0].max_weight)
        return (weight * (eps_hat - eps).square()).mean()

    params = {f"unet.{k}": p for k, p in unet.named_parameters()} | {
        f"text.{k}": p for k, p in text_encoder.named_parameters()
    }
    ema, done = run_training(
        params,
        loss,
        phases=settings.unet_phases,
        lr=settings.unet_lr,
        warmup=200,
        weight_decay=settings.weight_decay,
        ema_decay=settings.ema_decay,
        checkpoint=work / "unet.safetensors",
        save_every=250,
        max_minutes=max_minutes,
        desc="unet",
        log=work / "unet.jsonl",
    )
    load_ema(params, ema)
    return done


def kept_tokenizer(folder: Path, captions: list[str]):
    """The tokenizer of this run: learned once and kept, since a checkpoint's embeddings mean
    nothing under other token numbers.
    """
    if not (folder / "tokenizer.json").exists():
        embedded.build_tokenizer(captions).save_pretrained(folder)
    return embedded.CLIPTokenizer.from_pretrained(folder)


def train(dataset, folder: Path, work: Path, settings: TrainSettings) -> None:
    """Train everything from the train split of `dataset`; `folder` receives the pipeline, its
    settings and loss curves.
    """
    work.mkdir(parents=True, exist_ok=True)
    rows = dataset.split("train")
    images = to_tensor(rows.images(range(len(rows)), size=embedded.IMAGE_SIZE))
    vae = train_vae(images, settings, work)
    refine_decoder(vae, images, settings, work)
    table = caption_table(rows.records)
    tokenizer = kept_tokenizer(work / "tokenizer", [c for captions in table for c in captions])
    ids = tokenizer(
        [c for captions in table for c in captions], padding="max_length", return_tensors="pt"
    ).input_ids
    torch.manual_seed(settings.seed)
    text_encoder, unet = embedded.build_text_encoder(tokenizer), embedded.build_unet()
    latents = encode_latents(vae, images, settings)
    done = train_unet(latents, ids.view(len(rows), 4, -1), text_encoder, unet, settings, work)
    embedded.save_pipeline(embedded.build_pipeline(vae, text_encoder, tokenizer, unet), folder)
    curves = {
        name: [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        for name in ("vae", "decoder", "unet")
    }
    (folder / "training.json").write_text(
        json.dumps({"settings": asdict(settings), "steps": done, "curves": curves}, indent=0)
    )
