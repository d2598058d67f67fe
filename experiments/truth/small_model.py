"""The small model that is trained again: the embedded one with a narrower network. Its autoencoder
and tokenizer are kept, UNet and text encoder begin from scratch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from concept_trak.errors import UserError, git_restore_hint
from concept_trak.models.text_to_image import TextToImage
from concept_trak.validated_io import refuse_misfits
from experiments.emoji.model import pipeline as embedded
from experiments.training.loop import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class SmallSettings:
    """Size and training of the small model; part of the identity of all that is made with it."""

    channels: tuple[int, int] = (64, 128)  # at 8x8, without attention, and at 4x4, with it
    norm_groups: int = 16
    text_width: int = 128
    text_layers: int = 1
    steps: int = 2000
    batch: int = 48
    lr: float = 3e-3
    warmup: int = 100  # steps
    weight_decay: float = 1e-3
    ema_decay: float = 0.99
    max_weight: float = 10.0  # bound of the loss weight min(1 / abar_t, max_weight)
    empty_share: float = 0.1  # of the draws see no caption (Ho & Salimans 2022)
    object_share: float = 0.1  # ... the object alone
    style_share: float = 0.1  # ... the style alone


def build(like: TextToImage, settings: SmallSettings, seed: int) -> TextToImage:
    """A fresh small model with the autoencoder, tokenizer and latents of `like`, on its device.

    Its weights depend on the seed alone, not on the global generator.
    """
    s, unet, text = settings, like.network.config, like.pipe.text_encoder.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = UNet2DConditionModel.from_config(
            dict(unet)
            | {
                "block_out_channels": list(s.channels),
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "cross_attention_dim": s.text_width,
                "norm_num_groups": s.norm_groups,
            }
        )
        config = text.to_dict() | {
            "hidden_size": s.text_width,
            "intermediate_size": 2 * s.text_width,
            "projection_dim": s.text_width,
            "num_hidden_layers": s.text_layers,
        }
        encoder = CLIPTextModel(CLIPTextConfig(**config))
    encoder.set_attn_implementation("eager")  # a CPU's fused one takes longer on so few words
    return as_model(like, small.to(like.device), encoder.to(like.device))


def as_model(
    like: TextToImage, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> TextToImage:
    """Networks beside the other parts of `like`."""
    if like.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # see `text_to_image.load_pipeline`
    pipe = embedded.build_pipeline(like.pipe.vae, text_encoder, like.pipe.tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    return TextToImage(pipe, like.source)


def save(model: TextToImage, path: Path, settings: SmallSettings) -> None:
    """UNet and text encoder in fp16, as one safetensors file with their settings."""
    tensors = {name: p.half() for name, p in parameters(model).items()}
    save_checkpoint(path, tensors, {"settings": asdict(settings)})


def load(like: TextToImage, path: Path) -> TextToImage:
    """What `save` wrote, beside the other parts of `like`. UserError for a file that is none, or
    whose weights do not fit its settings.
    """
    tensors, state = load_checkpoint(path)
    try:
        settings = SmallSettings(**state["settings"])
        settings = replace(settings, channels=tuple(settings.channels))
        model = build(like, settings, 0)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no small model ({reason}); {git_restore_hint(path)}") from None
    own = parameters(model)
    like = {name: p.detach().half() for name, p in own.items()}
    refuse_misfits(tensors, like, f"{path} is no small model; it", git_restore_hint(path))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])
    return frozen(model)


def parameters(model: TextToImage) -> dict[str, torch.nn.Parameter]:
    """All that is trained, by name."""
    nets = {"unet": model.network, "text": model.pipe.text_encoder}
    return {f"{part}.{k}": p for part, net in nets.items() for k, p in net.named_parameters()}


def frozen(model: TextToImage) -> TextToImage:
    """The model, ready to be asked. Only now in the memory format of `load_pipeline`: in it the
    group norms of a training's bfloat16 take six times as long.
    """
    model.network.to(memory_format=torch.channels_last)
    for net in (model.network, model.pipe.text_encoder):
        net.eval().requires_grad_(False)
    return model
