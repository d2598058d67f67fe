"""Train the embedded text-to-image model: autoencoder first, then text encoder and UNet on its
latents.

Autoencoder   L = |x - D(z)|_1 + 10 |chroma(x - D(z))|_2^2 + edge_weight * |grad(x - D(z))|_1 + kl_weight * KL(q(z|x) || N(0, I)),
              z ~ q(z|x), chroma = a pixel's colour minus its grey level
Diffusion     L = || eps - eps_theta(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t, tau_theta(caption)) ||^2
              (DDPM, Ho et al. 2020, eq. 14; text encoder tau trained along, captions dropped with
              probability `cond_drop`)

Both loops write one checkpoint (safetensors + JSON) under its final name only when complete, and
resume from it:
the random stream of step s is seeded by (seed, s), so a killed and resumed run sees the same
batches.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one training step; the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def jitter(
    images: torch.Tensor, generator: torch.Generator, shift: float, scale: float, flip: float = 0.0
) -> torch.Tensor:
    """Shift, scale and (with probability `flip`) mirror each picture; what comes in from outside is
    white.

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
    return 1 - F.grid_sample(
        1 - images, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )


def edge_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of horizontal and vertical finite differences: keeps thin lines
    sharp.
    """
    d = x - y
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """Write tensors and a JSON state as one safetensors file; it appears under `path` only when
    complete.
    """
    part = path.with_suffix(".part")
    save_file(
        {k: v.detach().contiguous() for k, v in tensors.items()},
        part,
        metadata={"state": json.dumps(state)},
    )
    os.replace(part, path)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Inverse of `save_checkpoint`."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        state = json.loads(f.metadata()["state"])
    return load_file(path), state


class Ema:
    """Exponential moving average of parameters; decay warms up as (1 + step) / (10 + step)."""

    def __init__(self, params: dict[str, torch.Tensor], decay: float):
        self.decay = decay
        self.shadow = {k: p.detach().clone() for k, p in params.items()}

    def update(self, params: dict[str, torch.Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(params)
        torch._foreach_lerp_(
            [self.shadow[n] for n in names], [params[n].detach() for n in names], 1 - decay
        )


def _pack(params, ema, optimizer):
    tensors = {f"param/{k}": v for k, v in params.items()}
    tensors |= {f"ema/{k}": v for k, v in ema.shadow.items()}
    for name, p in params.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = optimizer.state[p][key]
    return tensors


def _unpack(tensors, state, params, ema, optimizer):
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(tensors[f"param/{name}"])
            ema.shadow[name].copy_(tensors[f"ema/{name}"])
            optimizer.state[p] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": tensors[f"exp_avg/{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
            }


@dataclass(frozen=True)
class Phase:
    """A stretch of a training run: `steps` steps of a cosine that would take `length` to come down
    (Loshchilov & Hutter 2017).
    """

    steps: int
    length: int
    max_weight: float = 1.0  # bound of the loss weight min(1 / abar_t, max_weight)
    peak: float = 1.0  # learning rate at its start, as a fraction of the run's


def phase_of(step: int, phases: tuple[Phase, ...]) -> tuple[Phase, int]:
    """(phase of a step, first step of that phase)."""
    start = 0
    for phase in phases:
        if step < start + phase.steps:
            return phase, start
        start += phase.steps
    return phases[-1], start - phases[-1].steps


def learning_rate(step: int, phases: tuple[Phase, ...], warmup: int) -> float:
    """Fraction of the run's rate: linear warm-up, then in every phase a cosine from its peak
    towards a twentieth of it.
    """
    phase, start = phase_of(step, phases)
    return (
        min(1.0, (step + 1) / warmup)
        * phase.peak
        * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - start) / phase.length)))
    )


def run_training(
    params: dict[str, torch.nn.Parameter],
    loss_of_step,
    *,
    phases: tuple[Phase, ...],
    lr: float,
    warmup: int,
    weight_decay: float,
    ema_decay: float,
    checkpoint: Path,
    save_every: int,
    max_minutes: float | None = None,
    desc: str = "train",
    log: Path | None = None,
) -> tuple[Ema, int]:
    """AdamW with the schedule of `learning_rate`, EMA, checkpoint and resume.

    loss_of_step: step -> scalar loss tensor. Stops after the last phase or `max_minutes`, whichever
    is first. Returns the EMA weights and the number of steps done. Raises FloatingPointError on a
    NaN loss.
    """
    tensors, steps = list(params.values()), sum(p.steps for p in phases)
    optimizer = torch.optim.AdamW(
        tensors, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), foreach=True
    )
    ema = Ema(params, ema_decay)
    start = 0
    if checkpoint.exists():
        saved, state = load_checkpoint(checkpoint)
        _unpack(saved, state, params, ema, optimizer)
        start = state["step"]
    begun, running = time.time(), None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=desc, mininterval=10)
    done = start
    for step in bar:
        rate = learning_rate(step, phases, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        loss = loss_of_step(step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{desc}: loss is {value} at step {step}; lower the learning rate and resume from "
                f"{checkpoint}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        ema.update(params, step)
        running = value if running is None else 0.98 * running + 0.02 * value
        done = step + 1
        out_of_time = max_minutes is not None and time.time() - begun > 60 * max_minutes
        if done % 50 == 0 and log is not None:
            bar.set_postfix(loss=f"{running:.4f}")
            with log.open("a") as f:
                f.write(
                    json.dumps(
                        {
                            "step": done,
                            "loss": round(running, 6),
                            "lr": lr * rate,
                            "seconds": round(time.time() - begun, 1),
                        }
                    )
                    + "\n"
                )
        if done % save_every == 0 or done == steps or out_of_time:
            save_checkpoint(checkpoint, _pack(params, ema, optimizer), {"step": done})
        if out_of_time:
            break
    return ema, done


def picture_loss(recon: torch.Tensor, images: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """What the autoencoder's pictures lack, [B, 3, H, W] in [-1, 1] each; module docstring, without
    the KL term.
    """
    error = recon - images
    # Colour gets a squared term of its own: most pixels are grey, so an L1 median stays grey for
    # thousands of steps.
    chroma = error - error.mean(1, keepdim=True)
    return error.abs().mean() + 10 * chroma.square().mean() + edge_weight * edge_loss(recon, images)


def vae_loss(
    vae, images: torch.Tensor, generator: torch.Generator, kl_weight: float, edge_weight: float
) -> torch.Tensor:
    """Autoencoder objective of the module docstring. images: [B, 3, H, W] in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return picture_loss(vae.decode(z).sample, images, edge_weight) + kl_weight * kl
