"""The embedded model: a small, real `StableDiffusionPipeline` (CLIP tokenizer and text model,
AutoencoderKL, UNet, DDIM).

Sizes are chosen for two CPU cores: pictures are drawn at 32x32 and become 8x8 latents; the
cross-attention layers carry the same names (`attn2.to_q/to_k/to_v/to_out.0`) as in SD 1.x, so every
script runs on either model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from concept_trak.atomic_io import write_bytes
from concept_trak.errors import remove_hint
from concept_trak.validated_io import read_json

IMAGE_SIZE = 32
TEXT_WIDTH = 192
# the longest caption has 11 words; start and end tokens, and some room for one's own prompts
MAX_TOKENS = 16


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP byte-level BPE whose merges are learned from `captions` until each of their words is
    one token.

    Any other text still has tokens (single bytes), as with CLIP.
    """
    # its normaliser and pre-tokeniser are CLIP's; only vocabulary and merges are ours
    template = CLIPTokenizer()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = template.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Ties between merges go by token number; numbering word ends first keeps the trainer's random
    # word order out of it.
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=[c + "</w>" for c in alphabet],
    )
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    # CLIPTextModel pools at the highest token id, so the end token must come last, as in CLIP.
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model; shallow, so that a token's state stays mostly its own word's."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """32x32x3 pictures <-> 8x8x16 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """8 M parameters; self- and cross-attention at 8x8 and 4x4 (diffusers reads
    `attention_head_dim` as the number of heads).
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    """SD 1.x's noise schedule (scaled_linear, 0.00085 to 0.012, 1000 steps, eps-prediction)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """Assemble the pipeline; no safety checker (the model has only ever seen emoji)."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save with fp16 weights as safetensors; `StableDiffusionPipeline.from_pretrained(folder)`
    loads it in fp32.
    """
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # transformers loads in the dtype its config names, diffusers in fp32: name fp32, or the two
    # would not fit together.
    path = Path(folder) / "text_encoder" / "config.json"
    config = {**read_json(path, remove_hint(folder)), "dtype": "float32"}
    write_bytes(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
