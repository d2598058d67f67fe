"""Picture damage that a judge of generated pictures must see through, batched and reproducible.

Every function maps [B, 3, H, W] in [0, 1] (ink on white) to the same shape and draws from the given
generator only. A generator is imperfect in place (warp), in colour (recolour), in sharpness
(soften), in texture (speckle, quantise) and in completeness (erase). Colours stay near the original
because colour is part of a style.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def _chance(batch: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(batch, 1, 1, 1, generator=generator) < probability).float()


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)


@dataclass(frozen=True)
class Warp:
    """How far `warp` goes at most."""

    shift: float = 0.1  # fraction of the side
    zoom: float = 0.25  # log range
    angle: float = 0.15  # radians
    elastic: float = 0.02  # standard deviation of the bend at 5 x 5 places, fraction of the side
    flip: float = 0.5  # probability of the mirror image


def warp(x: torch.Tensor, generator: torch.Generator, by: Warp | None = None) -> torch.Tensor:
    """Shift, zoom, rotate, mirror and bend; white comes in from outside."""
    batch, by = x.shape[0], by or Warp()
    scale = _uniform(batch, -by.zoom, by.zoom, generator).exp().flatten()
    turn = _uniform(batch, -by.angle, by.angle, generator).flatten()
    mirror = 1 - 2 * _chance(batch, by.flip, generator).flatten()
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * turn.cos() * mirror, -scale * turn.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * turn.sin() * mirror, scale * turn.cos()
    theta[:, :, 2] = (torch.rand(batch, 2, generator=generator) * 2 - 1) * 2 * by.shift
    bend = torch.randn(batch, 2, 5, 5, generator=generator) * 2 * by.elastic
    bend = F.interpolate(bend, size=x.shape[-2:], mode="bicubic", align_corners=False)
    grid = F.affine_grid(theta, x.shape, align_corners=False) + bend.permute(0, 2, 3, 1)
    # The sampler pads with zeros, so sample ink (0 on white paper).
    return 1 - F.grid_sample(1 - x, grid, padding_mode="zeros", align_corners=False)


def hue_matrix(angle: torch.Tensor) -> torch.Tensor:
    """[B] radians -> [B, 3, 3] rotation of RGB about the grey axis (Rodrigues): greys, hence paper,
    are fixed.
    """
    k = torch.full((3,), 1 / math.sqrt(3))
    cross = torch.tensor([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * torch.eye(3) + sin * cross + (1 - cos) * torch.outer(k, k)


def recolour(
    x: torch.Tensor,
    generator: torch.Generator,
    hue: float = 0.08,
    saturation: float = 0.12,
    contrast: float = 0.08,
    tint: float = 0.02,
) -> torch.Tensor:
    """Turn the hue (radians), scale saturation and ink contrast, add a small tint; white paper
    stays near white.
    """
    batch = x.shape[0]
    rotation = hue_matrix(_uniform(batch, -hue, hue, generator).flatten())
    x = torch.einsum("bij,bjhw->bihw", rotation, x)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * _uniform(batch, 1 - saturation, 1 + saturation, generator)
    x = 1 - (1 - x) * _uniform(batch, 1 - contrast, 1 + contrast, generator)
    return x + tint * torch.randn(batch, 3, 1, 1, generator=generator)


def blur(x: torch.Tensor, generator: torch.Generator, probability: float = 0.8) -> torch.Tensor:
    """Blur, by a small binomial kernel (once or twice) or by sampling the batch down and up."""
    chosen = _chance(x.shape[0], probability, generator)
    side = x.shape[-1]
    if torch.rand((), generator=generator) < 0.5:
        small = int(torch.randint(side // 2, side, (), generator=generator))
        soft = F.interpolate(x, size=small, mode="bilinear", antialias=True)
        soft = F.interpolate(soft, size=side, mode="bilinear", align_corners=False)
    else:
        soft = x
        for _ in range(int(torch.randint(1, 3, (), generator=generator))):
            soft = F.avg_pool2d(F.pad(soft, (1, 0, 1, 0), mode="replicate"), 2, 1)
            soft = F.pad(F.avg_pool2d(soft, 2, 1), (0, 1, 0, 1), mode="replicate")
    return x + chosen * (soft - x)


def add_noise(
    x: torch.Tensor, generator: torch.Generator, fine: float = 0.05, coarse: float = 0.15
) -> torch.Tensor:
    """Add pixel noise and latent-like blotches: coloured noise in cells of 4 pixels, enlarged."""
    batch, _, height, width = x.shape
    blotch = torch.randn(batch, 3, height // 4, width // 4, generator=generator)
    blotch = F.interpolate(blotch, size=(height, width), mode="bicubic", align_corners=False)
    pixel = torch.randn(x.shape, generator=generator)
    strength = _uniform(batch, 0, 1, generator) * _chance(batch, 0.5, generator)
    return x + strength * (coarse * _uniform(batch, 0, 1, generator) * blotch + fine * pixel)


def _dct_basis(n: int) -> torch.Tensor:
    k, i = torch.arange(n)[:, None], torch.arange(n)[None]
    basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def quantise(
    x: torch.Tensor, generator: torch.Generator, coarsest: float = 0.25, probability: float = 0.3
) -> torch.Tensor:
    """JPEG-like: round the coefficients of 8 x 8 cosine blocks with steps that grow with frequency.

    H, W: multiples of 8.
    """
    batch, channels, height, width = x.shape
    chosen = _chance(batch, probability, generator)
    basis = _dct_basis(8)
    blocks = x.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    frequency = (torch.arange(8)[:, None] + torch.arange(8)) / 7
    step = _uniform(batch, 0.2, 1, generator)[..., None, None] * coarsest * (0.04 + frequency)
    coefficients = ((basis @ blocks @ basis.T) / step).round() * step
    rough = (basis.T @ coefficients @ basis).transpose(3, 4).reshape(x.shape)
    return x + chosen * (rough - x)


def erase(
    x: torch.Tensor, generator: torch.Generator, largest: float = 0.35, probability: float = 0.4
) -> torch.Tensor:
    """Paint a rectangle of up to `largest` of each side white or in a random flat colour."""
    batch, _, height, width = x.shape
    size = largest * torch.rand(batch, 2, generator=generator)
    corner = torch.rand(batch, 2, generator=generator) * (1 - size)
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    inside_rows = (rows >= corner[:, :1]) & (rows < (corner + size)[:, :1])
    inside_columns = (columns >= corner[:, 1:]) & (columns < (corner + size)[:, 1:])
    inside = (inside_rows[:, None, :, None] & inside_columns[:, None, None, :]).float()
    white = _chance(batch, 0.5, generator)
    colour = white + (1 - white) * torch.rand(batch, 3, 1, 1, generator=generator)
    return x + _chance(batch, probability, generator) * inside * (colour - x)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All of the above, in the order in which a generator and a file format would do them.

    Values stay in [0, 1].
    """
    x = erase(warp(x, generator), generator)
    x = recolour(x, generator)
    x = quantise(add_noise(blur(x, generator), generator), generator)
    return x.clamp(0, 1)
