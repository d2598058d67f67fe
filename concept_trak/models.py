"""A diffusers pipeline as a `Denoiser`: eps(x_t, t, cond), text and image encoding, a hash of its weights."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from .errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Denoiser:
    """eps-prediction network with its noise schedule.

    network: module called as `call(network, x_t, t [B], cond)`; alpha_bar: [T] float64; prediction: "epsilon" or
    "v_prediction" (converted: eps = sqrt(abar) v + sqrt(1 - abar) x_t; Salimans & Ho 2022, appendix D).
    """

    def __init__(self, network: nn.Module, alpha_bar: torch.Tensor, latent_shape: tuple[int, ...], *, prediction: str = "epsilon", call=None):
        if prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type {prediction!r} is not supported; use an epsilon or v_prediction model")
        self.network, self.alpha_bar, self.latent_shape, self.prediction = network, alpha_bar.double().cpu(), tuple(latent_shape), prediction
        self._call = call or (lambda net, x_t, t, cond: net(x_t, t, encoder_hidden_states=cond).sample)
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def eps(self, x_t: torch.Tensor, t: int, cond: torch.Tensor) -> torch.Tensor:
        """eps_hat [B, C, H, W] at the common timestep t for conditions [B, T, d] (any batch-first form the network takes)."""
        out = self._call(self.network, x_t, torch.full((len(x_t),), t, device=x_t.device), cond)
        if self.prediction == "epsilon":
            return out
        a = float(self.alpha_bar[t])
        return a**0.5 * out + (1 - a) ** 0.5 * x_t


class TextToImage(Denoiser):
    """A Stable Diffusion 1.x/2.x pipeline (folder or hub id) as a Denoiser with text and image encoders."""

    def __init__(self, pipe, source: str):
        cfg = pipe.unet.config
        super().__init__(pipe.unet, pipe.scheduler.alphas_cumprod, (cfg.in_channels, cfg.sample_size, cfg.sample_size),
                         prediction=pipe.scheduler.config.prediction_type)
        self.pipe, self.source = pipe, source
        self.image_size = cfg.sample_size * pipe.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """[B, T, d] text embeddings, padded to the tokenizer's length; a longer prompt is cut there, as the pipeline does."""
        tokens = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.pipe.text_encoder(tokens.to(self.device))[0].to(self.dtype)

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> scaled latents [B, C, h, w]: the posterior mean, so that it does not depend on chance."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        return self.pipe.vae.encode(x).latent_dist.mean * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Scaled latents [B, C, h, w] -> RGB pictures."""
        x = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p) for p in pixels]

    def weight_hash(self) -> str:
        """sha256 over every component's weights (names, shapes, fp16 bytes): the same for one model loaded in any dtype."""
        digest = hashlib.sha256()
        for part in (self.pipe.unet, self.pipe.text_encoder, self.pipe.vae):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                value = tensor.detach().cpu()
                digest.update((value.half() if value.is_floating_point() else value).numpy().tobytes())
        return digest.hexdigest()


def load_pipeline(source: str, device: str = "cpu", dtype: str = "fp32") -> TextToImage:
    """Load a diffusers Stable Diffusion 1.x/2.x pipeline from a folder or the hub, safetensors only.

    UserError when the folder is missing or is not such a pipeline.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    if dtype not in DTYPES:
        raise UserError(f"DTYPE={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    local = os.sep in source or source.startswith(".") or Path(source).exists()
    if local and "/" in source and not Path(source).exists() and source.count("/") == 1 and not source.startswith((".", "/")):
        local = False  # owner/name: a hub id
    if local and not (Path(source) / "model_index.json").exists():
        raise UserError(f"{source} is not a diffusers pipeline folder (no model_index.json); give SD_MODEL_PATH a folder or a hub id")
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer releases prefer `dtype`, which older ones do not know
            pipe = StableDiffusionPipeline.from_pretrained(source, torch_dtype=DTYPES[dtype], safety_checker=None, use_safetensors=True,
                                                           requires_safety_checker=False)
    except (OSError, ValueError, EnvironmentError) as error:
        raise UserError(f"cannot load the pipeline {source}: {str(error).splitlines()[0]}; check SD_MODEL_PATH") from error
    pipe.to(device)
    if torch.device(device).type == "cpu":
        # On the CPU the fused attention's backward is several times slower than the plain one at these sizes.
        pipe.unet.set_attn_processor(AttnProcessor())
        pipe.unet.to(memory_format=torch.channels_last)  # convolutions, half of the time, are a fifth faster
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    return TextToImage(pipe, source)
