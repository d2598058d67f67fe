"""The embedded model is an ordinary Stable Diffusion pipeline, only smaller."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from concept_trak.gradients.select import select_parameters
from experiments.emoji.model import pipeline as embedded

CAPTIONS = ["a cat in the style of openmoji line", "an ice cream in the style of blob"]


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.build_tokenizer(CAPTIONS)


def test_every_word_of_a_caption_is_one_token(tokenizer):
    for caption in CAPTIONS:
        assert len(tokenizer.tokenize(caption)) == len(caption.split())


def test_other_words_are_tokenised_too_and_the_end_token_comes_last(tokenizer):
    tokens = tokenizer("a zebra!", padding="max_length")["input_ids"]
    assert len(tokens) == embedded.MAX_TOKENS
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == "azebra!"


def test_tokeniser_is_the_same_at_every_build_whatever_the_order_of_the_captions(tokenizer):
    """A resumed training builds it again: other token numbers would scramble the text encoder."""
    for _ in range(6):
        assert embedded.build_tokenizer(CAPTIONS[::-1]).get_vocab() == tokenizer.get_vocab()


def test_schedule_is_that_of_stable_diffusion_1():
    scheduler = embedded.build_scheduler()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    config = scheduler.config
    assert (
        config.prediction_type,
        config.steps_offset,
        config.set_alpha_to_one,
        config.clip_sample,
    ) == ("epsilon", 1, False, False)


def test_cross_attention_carries_the_names_of_stable_diffusion_1():
    names = list(select_parameters(embedded.build_unet(), "attn2"))
    assert {n.split("attn2.")[1] for n in names} == {
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
        "to_out.0.bias",
    }
    assert {n.split("_")[0] for n in names} == {"down", "up", "mid"}


def test_the_whole_pipeline_is_within_30_mb_in_fp16(tokenizer):
    parts = (embedded.build_vae(), embedded.build_text_encoder(tokenizer), embedded.build_unet())
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 29e6


def test_a_saved_pipeline_is_fp16_safetensors_and_loads_with_plain_diffusers(tiny_pipeline):
    assert (
        not list(tiny_pipeline.rglob("*.bin"))
        and (tiny_pipeline / "unet/diffusion_pytorch_model.safetensors").exists()
    )
    assert (
        json.loads((tiny_pipeline / "model_index.json").read_text())["_class_name"]
        == "StableDiffusionPipeline"
    )
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, torch_dtype=torch.float16)
    assert next(pipe.unet.parameters()).dtype == torch.float16
    pipe.set_progress_bar_config(disable=True)
    assert pipe.to(dtype=torch.float32)("a cat", num_inference_steps=2).images[0].size == (8, 8)
