"""Drawing pictures: DDIM (eta = 0) under classifier-free guidance against a negative prompt.

x0 = DDIM(x_T),      eps = eps(negative) + w (eps(prompt) - eps(negative))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from .ddim import GuidedDenoiser, ddim_sample
from .text_to_image import TextToImage


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn: guidance weight w, steps of DDIM, and what to stay away from."""

    guidance_scale: float
    num_steps: int
    negative_prompt: str = ""


def initial_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """x_T [1, C, h, w] of a seed, for latents [C, h, w]: float32, drawn on the CPU, so that a seed
    means the same on every device.
    """
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def sample(
    model: TextToImage,
    prompts: list[str],
    x_T: torch.Tensor,
    generation: SamplingSettings,
    batch_size: int,
) -> torch.Tensor:
    """x0 [n, C, h, w] of n prompts from x_T [n, C, h, w], or [1, C, h, w] for all of them.

    `batch_size` pictures are drawn at a time; more than one batch shows a progress bar.
    """
    n, drawn = len(prompts), []
    x_T = x_T.to(model.device, model.dtype).expand(n, -1, -1, -1)
    batches = range(0, n, batch_size)
    for start in tqdm(batches, desc="generating") if len(batches) > 1 else batches:
        part = prompts[start : start + batch_size]
        encoded = model.encode_prompts([*part, generation.negative_prompt])
        cond, cond_null = encoded[: len(part)], encoded[len(part) :].expand(len(part))
        guided = GuidedDenoiser(model, cond, cond_null, generation.guidance_scale)
        x0, _ = ddim_sample(guided, x_T[start : start + batch_size], generation.num_steps)
        drawn.append(x0)
    return torch.cat(drawn)
