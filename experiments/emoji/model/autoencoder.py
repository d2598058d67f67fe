"""The autoencoder of the embedded model, then its decoder once more with the encoder frozen.

    L = |x - D(z)|_1 + 10 |chroma(x - D(z))|_2^2 + edge_weight |grad(x - D(z))|_1
        + kl_weight KL(q(z|x) || N(0, I)),      z ~ q(z|x)

where chroma is a pixel's colour minus its grey level. For the decoder alone z is the mean of q with
some noise, and there is no KL.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from experiments.training.loop import LrPhase, Run, run_training, step_generator, tensor_hash

from . import pipeline as embedded

LOOP = {"warmup": 100, "ema_decay": 0.995, "save_every": 200}  # of both trainings


@dataclass(frozen=True)
class AutoencoderSettings:
    """Hyper-parameters of both trainings."""

    seed: int = 0
    vae_phases: tuple[LrPhase, ...] = (
        LrPhase(1500, 1500),
        LrPhase(900, 900),
        LrPhase(6000, 6000, peak=0.6),
    )
    vae_batch: int = 8
    vae_lr: float = 2e-3
    kl_weight: float = 2e-4
    edge_weight: float = 0.5
    vae_shift: float = 0.06
    vae_scale: float = 0.08
    decoder_phases: tuple[LrPhase, ...] = (LrPhase(1600, 4000), LrPhase(1200, 1200, peak=0.65))
    decoder_batch: int = 16
    decoder_lr: float = 1.5e-3
    # added to the latents, in their own standard deviations: the UNet's are not exact either
    decoder_noise: float = 0.03

    def without(self, *prefixes: str) -> dict[str, Any]:
        """The fields that a training depends on; its phases a checkpoint compares by itself."""
        return {
            k: v
            for k, v in asdict(self).items()
            if not k.startswith(prefixes) and not k.endswith("_phases")
        }


def jitter(
    images: torch.Tensor, generator: torch.Generator, shift: float, scale: float, flip: float = 0.0
) -> torch.Tensor:
    """Shift, scale and (with probability `flip`) mirror each picture; white comes in from outside.

    images: [B, 3, H, W] in [-1, 1]. shift: largest translation as a fraction of the side. scale:
    log-uniform zoom range, a picture covers between exp(-2 * scale) and 1 times its size (art never
    leaves the canvas by zooming).
    """
    batch = images.shape[0]
    zoom = torch.exp(2 * scale * torch.rand(batch, generator=generator))
    offset = (torch.rand(batch, 2, generator=generator) * 2 - 1) * shift * 2
    mirror = 1 - 2 * (torch.rand(batch, generator=generator) < flip).float()
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = zoom * mirror
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    # The sampler pads with zeros, so sample "ink" (0 on white paper).
    return 1 - F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)


def edge_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of horizontal and vertical finite differences: keeps lines sharp."""
    d = x - y
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def picture_loss(recon: torch.Tensor, images: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """The module docstring's loss without the KL term; both [B, 3, H, W] in [-1, 1]."""
    error = recon - images
    # Colour gets a squared term of its own: most pixels are grey, so an L1 median stays grey for
    # thousands of steps.
    chroma = error - error.mean(1, keepdim=True)
    return error.abs().mean() + 10 * chroma.square().mean() + edge_weight * edge_loss(recon, images)


def vae_loss(
    vae: AutoencoderKL, images: torch.Tensor, g: torch.Generator, settings: AutoencoderSettings
) -> torch.Tensor:
    """The module docstring's loss. images: [B, 3, H, W] in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=g)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    recon = vae.decode(z).sample
    return picture_loss(recon, images, settings.edge_weight) + settings.kl_weight * kl


def decoder_loss(
    vae: AutoencoderKL, images: torch.Tensor, g: torch.Generator, settings: AutoencoderSettings
) -> torch.Tensor:
    """The loss of the decoder alone. images: [B, 3, H, W] in [-1, 1]."""
    with torch.no_grad():
        z = vae.encode(images).latent_dist.mean
    noise = settings.decoder_noise / vae.config.scaling_factor
    recon = vae.decode(z + noise * torch.randn(z.shape, generator=g)).sample
    return picture_loss(recon, images, settings.edge_weight)


def draw_pictures(
    images: torch.Tensor, batch: int, g: torch.Generator, settings: AutoencoderSettings
) -> torch.Tensor:
    """[batch, 3, H, W], with replacement, jittered and half of them mirrored."""
    chosen = images[torch.randint(len(images), (batch,), generator=g)]
    return jitter(chosen, g, settings.vae_shift, settings.vae_scale, 0.5)


def train_vae(images: torch.Tensor, settings: AutoencoderSettings, work: Path) -> AutoencoderKL:
    """Autoencoder with averaged weights, and its latent scale set: latents have unit variance.

    images: [N, 3, H, W] in [-1, 1]. Goes on from work / vae.safetensors.
    """
    torch.manual_seed(settings.seed)
    vae, path = embedded.build_vae(), work / "vae.safetensors"

    def loss(step: int) -> torch.Tensor:
        g = step_generator(settings.seed, step)
        return vae_loss(vae, draw_pictures(images, settings.vae_batch, g, settings), g, settings)

    params = dict(vae.named_parameters())
    made_from = settings.without("decoder_") | {"pictures": tensor_hash([images])}
    schedule = settings.vae_phases, settings.vae_lr
    run = Run(path, *schedule, **LOOP, desc="autoencoder", made_from=made_from)
    run_training(params, loss, run).copy_to(params)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        scale = torch.cat([vae.encode(b).latent_dist.mean for b in images.split(64)]).std().item()
    vae.register_to_config(scaling_factor=1 / scale)
    return vae


def refine_decoder(
    vae: AutoencoderKL, images: torch.Tensor, settings: AutoencoderSettings, work: Path
) -> None:
    """Train the decoder on with the encoder frozen: the latents, and so the UNet, stay as they are
    while pictures get sharper. Goes on from work / decoder.safetensors.
    """
    path, parts = work / "decoder.safetensors", ("decoder.", "post_quant_conv.")
    decoder = {k: p for k, p in vae.named_parameters() if k.startswith(parts)}
    start = {"pictures": tensor_hash([images]), "vae": tensor_hash(vae.parameters())}

    def loss(step: int) -> torch.Tensor:
        g = step_generator(settings.seed + 3, step)
        batch = draw_pictures(images, settings.decoder_batch, g, settings)
        return decoder_loss(vae, batch, g, settings)

    for p in decoder.values():
        p.requires_grad_(True)
    schedule = settings.decoder_phases, settings.decoder_lr
    run = Run(path, *schedule, **LOOP, desc="decoder", made_from=settings.without() | start)
    run_training(decoder, loss, run).copy_to(decoder)
    vae.requires_grad_(False)
