"""What is asked: which training images taught the model this concept of this picture?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..models.sample import SamplingSettings, initial_noise, sample
from ..models.text_to_image import TextToImage
from ..settings import Settings


@dataclass(frozen=True, eq=False)
class QueryImage:
    """A picture that is asked about.

    x0 [1, C, h, w]: its latents. x_T [1, C, h, w]: the noise that it was generated from, None for a
    picture that was not. pixels: uint8 [H, W, 3]. source: JSON that decides all of them. A picture
    that is only asked about from its x_T need not be drawn.
    """

    prompt: str
    x0: torch.Tensor | None
    x_T: torch.Tensor | None
    pixels: np.ndarray | None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Query:
    """One concept of a picture. words: the concept's own; plus, minus: the prompts c+ and c-."""

    picture: QueryImage
    words: str
    plus: str
    minus: str
    concept: str = ""  # its kind in a benchmark, e.g. "style"

    def identity(self) -> dict[str, Any]:
        """JSON that decides the question."""
        contrast = {"plus": self.plus, "minus": self.minus}
        return {"prompt": self.picture.prompt, "picture": self.picture.source, **contrast}


def generation(settings: Settings) -> SamplingSettings:
    """How the settings draw a picture."""
    s = settings
    return SamplingSettings(s.gen_guidance_scale, s.gen_num_inference_steps, s.negative_prompt)


def picture_identity(model: TextToImage, settings: Settings) -> dict[str, Any]:
    """JSON that decides the latents of the picture of PROMPT and SEED."""
    s = settings
    return {
        "prompt": s.prompt,
        "seed": s.seed,
        "generation": asdict(generation(s)),
        "model": model.identity(),
        "tokens": model.tokens,
        "dtype": s.dtype,
        "device": str(model.device),
        "torch": torch.__version__,
    }


def generate(
    model: TextToImage,
    settings: Settings,
    prompts: Sequence[str],
    seed: int,
    known: torch.Tensor | None = None,
) -> list[QueryImage]:
    """DDIM samples of the prompts, all from the noise of one seed, drawn on the CPU.

    known: their latents [n, C, h, w] where they were drawn before.
    """
    x_T = initial_noise(model.latent_shape, seed).to(model.device, model.dtype)
    if known is not None:
        drawn = known.to(model.device, model.dtype)
    else:
        noise, how = x_T.expand(len(prompts), -1, -1, -1), generation(settings)
        drawn = sample(model, list(prompts), noise, how, settings.batch_size)
    source = sample_settings(settings, seed)
    pixels = [np.asarray(picture) for x0 in drawn.split(64) for picture in model.decode(x0)]
    parts = zip(prompts, drawn.split(1), pixels, strict=True)
    return [QueryImage(prompt, x0, x_T, shown, source) for prompt, x0, shown in parts]


def sample_settings(settings: Settings, seed: int) -> dict[str, Any]:
    """`QueryImage.source` of a sample."""
    keys = ("gen_guidance_scale", "gen_num_inference_steps", "negative_prompt", "dtype")
    return {"generated": {"seed": seed, **{k: getattr(settings, k) for k in keys}}}
