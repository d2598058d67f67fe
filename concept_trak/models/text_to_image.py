"""A diffusers pipeline as a `Denoiser`, with its encoders and a hash of its weights."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..errors import UserError, script_hint
from .condition import Condition
from .config_check import check_class, check_configs
from .denoiser import NetworkDenoiser
from .hashing import COMMITTED, ENCODERS, config_hash, hash_of, loaded_configs, weights_hash
from .lora import load_lora
from .model_files import side_of
from .pipelines import check_tokenizer, open_pipeline, refuse_schedule, told_of
from .schedule import VariancePreserving

TRAIN_TOKEN = f"train it again (3,000 steps of the model): {script_hint('abc/run_ti.sh')}"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TextToImage(NetworkDenoiser):
    """A Stable Diffusion 1.x/2.x pipeline (folder or hub id) as a Denoiser with text and image
    encoders.

    Its identity has two parts: `identity()`, the model as loaded, decides whether train gradients
    are still valid; `tokens` ({token: sha256 of its embedding}), words added since, only matter to
    what was made from a prompt that holds them.
    """

    def __init__(self, pipe: Any, source: str, hashes: dict[str, str] | None = None) -> None:
        cfg = pipe.unet.config
        prediction = pipe.scheduler.config.prediction_type
        schedule = VariancePreserving(pipe.scheduler.alphas_cumprod, prediction)
        side = side_of(cfg)
        super().__init__(pipe.unet, schedule, (cfg.in_channels, side, side))
        self.pipe, self.source = pipe, source
        self.tokens: dict[str, str] = {}
        self.spelt: dict[str, list[str]] = {}  # the words that a token is read as, see `read_as`
        self.hashes = dict(hashes or {})  # those that are known, by name
        self.image_size = side * pipe.vae_scale_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """[B, T, d] text embeddings, padded to the tokenizer's length; a longer prompt is cut
        there, as the pipeline does.
        """
        tokens = self.pipe.tokenizer(
            list(map(self.read_as, prompts)),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return Condition(self.pipe.text_encoder(tokens.to(self.device))[0].to(self.dtype))

    def lost_words(self, prompt: str) -> str:
        """The end of the prompt that `encode_prompts` cuts off, in whole words; empty if it fits.

        A word that is cut in the middle is lost.
        """
        tokenizer = self.pipe.tokenizer
        room = tokenizer.model_max_length

        def fits(words: list[str]) -> bool:
            return len(tokenizer(self.read_as(" ".join(words))).input_ids) <= room

        words = prompt.split()
        if fits(words):
            return ""
        kept = bisect.bisect_left(range(1, len(words) + 1), True, key=lambda n: not fits(words[:n]))
        return " ".join(words[kept:])

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> scaled latents [B, C, h, w]: the posterior mean, so that it does
        not depend on chance.
        """
        x = (
            torch.from_numpy(np.ascontiguousarray(images))
            .to(self.device)
            .permute(0, 3, 1, 2)
            .to(self.dtype)
            / 127.5
            - 1
        )
        return self.pipe.vae.encode(x).latent_dist.mean * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Scaled latents [B, C, h, w] -> RGB pictures."""
        x = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        pixels = (
            ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        )
        return [Image.fromarray(p) for p in pixels]

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """What the autoencoder makes of pictures, uint8 [n, H, W, 3] -> the same shape: a bound on
        any network between its halves.
        """
        parts = (images[i : i + 64] for i in range(0, len(images), 64))
        return np.stack(
            [
                np.asarray(picture)
                for part in parts
                for picture in self.decode(self.encode_images(part))
            ]
        )

    @torch.no_grad()
    def add_token(self, token: str, embedding: torch.Tensor) -> int:
        """Make `token` a word with this embedding [d], or several [n, d] that are read one after
        another, and return the first one's number; a token added before gets the new embedding.

        Nothing else changes: not `weight_hash()`, and not the encoding of a prompt without the
        token. UserError when the embedding has another width or is not finite, or when the token is
        a word of the model already.
        """
        self.identity(), self.encoder_hash()  # of the model without its tokens
        tokenizer, table = self.pipe.tokenizer, self.pipe.text_encoder.get_input_embeddings()
        rows, width = embedding.detach().float().cpu(), table.weight.shape[1]
        rows = rows[None] if rows.dim() == 1 else rows
        room = tokenizer.model_max_length - 2
        if rows.dim() != 2 or rows.shape[1] != width or not 1 <= len(rows) <= room:
            raise UserError(
                f"the embedding of {token} has shape {list(embedding.shape)}, but this text "
                f"encoder's have [{width}] (up to {room} of them), so it is of another model; "
                "set TI_MODEL_PATH, TI_WEIGHT_NAME to one of this model"
            )
        if not rows.isfinite().all():
            raise UserError(f"the embedding of {token} is NaN or infinite; {TRAIN_TOKEN}")
        if type(table) is not nn.Embedding:
            raise UserError(
                f"the text encoder's word table is a {type(table).__name__}; set "
                "LORA_PATH to one that leaves token_embedding alone"
            )
        words = [token, *(f"{token}_{i}" for i in range(1, len(rows)))]
        known = tokenizer.get_vocab()
        if token not in self.tokens and (not token or any(word in known for word in words)):
            raise UserError(f"{token!r} is a word of this model already; give --token another")
        tokenizer.add_tokens([word for word in words if word not in known])
        numbers = tokenizer.convert_tokens_to_ids(words)
        if (more := max(numbers) + 1 - table.num_embeddings) > 0:
            # not resize_token_embeddings, which draws the new row from a fit to all others first
            grown = torch.cat([table.weight, table.weight.new_zeros(more, width)])
            table = nn.Embedding.from_pretrained(grown, freeze=True)
            self.pipe.text_encoder.set_input_embeddings(table)
            self.pipe.text_encoder.config.vocab_size = len(grown)
        table.weight[numbers] = rows.to(table.weight)
        self.tokens[token] = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        self.spelt[token] = words
        return numbers[0]

    def read_as(self, prompt: str) -> str:
        """A prompt as the tokenizer is given it: a token of several embeddings as that many words,
        `<new1> <new1>_1 ...`, as diffusers writes them.
        """
        for token, words in self.spelt.items():
            if len(words) > 1:
                prompt = prompt.replace(token, " ".join(words))
        return prompt

    def weight_hash(self) -> str:
        """sha256 over every component's weights (names, shapes, fp16 bytes) and LoRA scales: the
        same for a model loaded in any dtype.

        Computed once an instance, since its weights are frozen, and before the first `add_token`:
        added words do not enter.
        """
        return self._once(
            "weights", lambda: weights_hash((self.pipe.unet, self.pipe.text_encoder, self.pipe.vae))
        )

    def identity(self) -> str:
        """Of the model as loaded: `weight_hash()` and how the weights are read (configurations,
        schedule, tokenizer), see `models.hashing`.
        """
        reading = self._once("reading", lambda: config_hash(self.pipe))
        weights = self.weight_hash()
        return weights if reading in ("", COMMITTED) else hash_of([weights, reading])

    def encoder_hash(self) -> str:
        """The same of what encodes pictures and prompts: autoencoder, text encoder, tokenizer."""
        return self._once("encoders", self._encoder_hash)

    def _encoder_hash(self) -> str:
        weights = weights_hash((self.pipe.text_encoder, self.pipe.vae))
        return hash_of([weights, config_hash(self.pipe, ENCODERS)])

    def _once(self, name: str, compute: Callable[[], str]) -> str:
        if name not in self.hashes:
            self.hashes[name] = compute()
        return self.hashes[name]


def load_pipeline(
    source: str, device: str = "cpu", dtype: str = "fp32", lora_path: str = ""
) -> TextToImage:
    """Load a Stable Diffusion 1.x/2.x pipeline (eps- or v-prediction) from a folder or the hub,
    with a LoRA if given; safetensors only.

    UserError as `pipelines.open_pipeline` and `pipelines.load_lora` raise it, or for an unknown
    dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"DTYPE={dtype!r} is unknown; set DTYPE to one of {', '.join(DTYPES)}")
    # bf16 rounds away what the hash of the weights is over, so it is taken before
    pipe = open_pipeline(source, DTYPES["fp32" if dtype == "bf16" else dtype])
    if lora_path:
        load_lora(pipe, lora_path)
    whole = TextToImage(pipe, source)
    if dtype == "bf16":
        whole.identity(), whole.encoder_hash()
    return frozen(pipe, source, device, DTYPES[dtype] if whole.hashes else None, whole.hashes)


def from_pipeline(pipe: Any, device: str = "cpu") -> TextToImage:
    """A loaded `StableDiffusionPipeline` in the dtype that it has, moved to `device` and frozen.

    UserError for a pipeline of another kind, as for a folder.
    """
    source = str(getattr(pipe, "name_or_path", "") or "the given pipeline")
    check_class(type(pipe).__name__, source)
    configs = loaded_configs(pipe)
    check_configs(configs, source)
    with told_of(source, "scheduler"):
        refuse_schedule(pipe.scheduler)
    with told_of(source, "tokenizer"):
        check_tokenizer(pipe.tokenizer, pipe.text_encoder)
    words = {"tokenizer": sorted(pipe.tokenizer.get_vocab().items())}
    return frozen(pipe, source, device, None, {"reading": hash_of(configs | words)})


def frozen(
    pipe: Any, source: str, device: str, dtype: torch.dtype | None, hashes: dict[str, str]
) -> TextToImage:
    """A pipeline on its device, without gradients of its own parameters."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe.to(device, *([] if dtype is None else [dtype]))
    if torch.device(device).type == "cpu":
        # On the CPU the fused attention's backward is several times slower than the plain one at
        # these sizes.
        pipe.unet.set_attn_processor(AttnProcessor())
        pipe.unet.to(
            memory_format=torch.channels_last
        )  # convolutions, half of the time, are a fifth faster
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    return TextToImage(pipe, source, hashes)
