"""A class-conditional model on pixels as a `Denoiser`: a small U-Net or diffusion transformer.

    z = unshuffle(2 pixels / 255 - 1)        [3 p^2, size / p, size / p],  p = `patch`

An orthogonal rearrangement of pixels stands where an autoencoder would, so latents are pixels. The
networks are those of diffusers (UNet2DConditionModel; PixArtTransformer2DModel: Peebles & Xie 2023
with cross-attention, Chen et al. 2024) and read one token an attribute by cross-attention, `attn2`
as in Stable Diffusion: the same parameters are selected, and rows, store, scoring and rankers work
unchanged. Noise schedule: DDPM's, linear from 1e-4 to 0.02 (Ho et al. 2020).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import nn

from ..atomic_io import atomic_folder, write_bytes, write_json
from ..errors import UserError, script_hint
from ..validated_io import read_json, read_safetensors
from .condition import Condition
from .denoiser import NetworkDenoiser
from .hashing import hash_of, weights_hash
from .schedule import NUM_TRAIN_TIMESTEPS, VariancePreserving
from .vocabulary import Vocabulary

NETWORKS = ("unet", "dit")
CONFIG, WEIGHTS = "class_conditional.json", "network.safetensors"
MEND = (
    "remove its folder and train it again (about an hour), e.g. "
    f"{script_hint('synthetic/run_all.sh', STAGE='train')}"
)


@dataclass(frozen=True)
class Architecture:
    """Sizes. size: side of a picture, pixels. patch: side of the square that becomes one position.

    width: channels of the U-Net's finer level, or of the transformer. depth: the U-Net's layers a
    level, or the transformer's blocks.
    """

    network: str = "unet"
    size: int = 32
    patch: int = 4
    width: int = 64
    depth: int = 1
    heads: int = 4

    def build(self, vocabulary: Vocabulary, seed: int) -> nn.Module:
        """Fresh weights, which depend on the seed alone. UserError for an unknown network."""
        if self.network not in NETWORKS:
            known = ", ".join(NETWORKS)
            raise UserError(f"NETWORK={self.network!r} is unknown; set NETWORKS to some of {known}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return (_unet if self.network == "unet" else _transformer)(self, vocabulary)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of z."""
        side = self.size // self.patch
        return 3 * self.patch**2, side, side


def _unet(a: Architecture, vocabulary: Vocabulary) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    channels, side, _ = a.latent_shape
    net = UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(a.width, 3 * a.width // 2),
        layers_per_block=a.depth,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=vocabulary.width,
        attention_head_dim=a.heads,
        norm_num_groups=a.width // 4,
    )
    net.set_attn_processor(AttnProcessor())  # see `text_to_image.load_pipeline`
    return net.to(memory_format=torch.channels_last)


def _transformer(a: Architecture, vocabulary: Vocabulary) -> nn.Module:
    from diffusers import PixArtTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor

    channels, side, _ = a.latent_shape
    net = PixArtTransformer2DModel(
        num_attention_heads=a.heads,
        attention_head_dim=a.width // a.heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=a.depth,
        cross_attention_dim=a.width,
        caption_channels=vocabulary.width,
        sample_size=side,
        patch_size=1,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    net.set_attn_processor(AttnProcessor())
    return net


def call_network(
    network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Condition
) -> torch.Tensor:
    """Either network as `NetworkDenoiser` calls it."""
    extra: dict[str, Any] = {}
    if hasattr(network, "adaln_single"):  # the transformer asks for it even where it has no use
        extra["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return network(x_t, timestep=t, encoder_hidden_states=cond.embeddings, **extra).sample


class ClassConditional(NetworkDenoiser):
    """A `Denoiser` that is asked by captions of its `Vocabulary`, with pixels for latents.

    It answers to what `TextToImage` answers to; no word can be added to it.
    """

    def __init__(
        self, network: nn.Module, architecture: Architecture, vocabulary: Vocabulary
    ) -> None:
        self.architecture, self.vocabulary = architecture, vocabulary
        super().__init__(network, ddpm_schedule(), architecture.latent_shape, call_network)
        self.image_size, self.tokens = architecture.size, {}
        self._identity = ""

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """[B, A, width] one-hot tokens of captions. UserError for an unknown word."""
        return self.encode_labels([self.vocabulary.parse(prompt) for prompt in prompts])

    def encode_labels(self, labels: list[dict[str, str]]) -> Condition:
        """The same of {attribute: class}, attributes that are missing left open."""
        tokens = self.vocabulary.tokens(self.vocabulary.indices(labels))
        return Condition(tokens.to(self.device, self.dtype))

    def lost_words(self, prompt: str) -> str:
        """Empty: nothing is cut off."""
        return ""

    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> z [B, 3 p^2, h, w]."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        x = x.to(self.dtype) / 127.5 - 1
        return nn.functional.pixel_unshuffle(x, self.architecture.patch)

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """z [B, 3 p^2, h, w] -> RGB pictures."""
        x = nn.functional.pixel_shuffle(latents.float(), self.architecture.patch)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [Image.fromarray(p) for p in pixels.cpu().numpy()]

    def weight_hash(self) -> str:
        """See `identity`; a class-conditional model has no other."""
        return self.identity()

    def identity(self) -> str:
        """sha256 over weights, sizes and vocabulary, computed once: its weights are frozen."""
        if not self._identity:
            weights = weights_hash([self.network])
            self._identity = hash_of([weights, asdict(self.architecture), self._words()])
        return self._identity

    def save(self, folder: Path, made_from: dict[str, Any]) -> None:
        """Weights, sizes and vocabulary; made_from: JSON that tells how it was trained."""
        with atomic_folder(folder) as made:
            tensors = {k: v.detach().contiguous() for k, v in self.network.state_dict().items()}
            write_bytes(made / WEIGHTS, to_safetensors(tensors))
            content = {"architecture": asdict(self.architecture), "attributes": self._words()}
            write_json(made / CONFIG, {**content, "made_from": made_from})

    def _words(self) -> list[list[Any]]:
        return [[name, list(classes)] for name, classes in self.vocabulary.attributes.items()]


def ddpm_schedule() -> VariancePreserving:
    """Linear betas, predicting v."""
    betas = torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    return VariancePreserving((1 - betas).cumprod(0), "v_prediction")


def is_class_conditional(source: str) -> bool:
    """Whether a folder holds one."""
    return (Path(source) / CONFIG).is_file()


def load_class_conditional(
    source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ClassConditional:
    """What `ClassConditional.save` wrote, frozen. UserError for a folder that is none."""
    folder = Path(source)
    config = read_json(folder / CONFIG, MEND)
    tensors = read_safetensors(folder / WEIGHTS, MEND)
    try:
        architecture = replace(Architecture(), **config["architecture"])
        words = {str(name): tuple(map(str, classes)) for name, classes in config["attributes"]}
        vocabulary = Vocabulary(words)
        network = architecture.build(vocabulary, 0)
        network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder} is no class-conditional model ({reason}); {MEND}") from None
    network.to(device, dtype).eval().requires_grad_(False)
    return ClassConditional(network, architecture, vocabulary)


def made_from(source: str | Path) -> dict[str, Any]:
    """What a saved model says that it was trained from; {} where there is none."""
    path = Path(source) / CONFIG
    found = json.loads(path.read_text()).get("made_from") if path.is_file() else None
    return found if isinstance(found, dict) else {}
