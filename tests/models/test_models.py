"""A diffusers pipeline as a denoiser."""

import json
import shutil

import numpy as np
import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.models.ddim import GuidedDenoiser, ddim_sample
from concept_trak.models.text_to_image import load_pipeline
from concept_trak.settings import ROOT
from experiments.emoji.model.pipeline import build_scheduler


def test_weight_hash_is_the_same_whatever_the_dtype_it_is_loaded_in(tiny_model, tiny_pipeline):
    assert load_pipeline(str(tiny_pipeline), dtype="fp16").weight_hash() == tiny_model.weight_hash()


def test_weight_hash_sees_one_changed_weight(tiny_pipeline, tiny_model):
    model = load_pipeline(str(tiny_pipeline))
    with torch.no_grad():
        next(model.pipe.text_encoder.parameters()).view(-1)[0] += 0.25
    assert model.weight_hash() != tiny_model.weight_hash()


def test_weight_hash_is_computed_once(tiny_pipeline):
    model = load_pipeline(str(tiny_pipeline))
    first, model.pipe = model.weight_hash(), None
    assert model.weight_hash() == first


def changed_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def words_exchanged(folder):
    path = folder / "tokenizer/tokenizer.json"
    known = json.loads(path.read_text())
    vocab = known["model"]["vocab"]
    vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    path.write_text(json.dumps(known))


def other_noise(folder):
    changed_json(folder / "scheduler/scheduler_config.json", beta_end=0.013)


def other_scale(folder):
    changed_json(folder / "vae/config.json", scaling_factor=0.7)


def other_activation(folder):
    changed_json(folder / "text_encoder/config.json", hidden_act="gelu")


@pytest.mark.parametrize("change", [words_exchanged, other_noise, other_scale, other_activation])
def test_the_same_weights_read_otherwise_are_another_model(
    tmp_path, tiny_pipeline, tiny_model, change
):
    shutil.copytree(tiny_pipeline, tmp_path / "other")
    change(tmp_path / "other")
    other = load_pipeline(str(tmp_path / "other"))
    assert other.weight_hash() == tiny_model.weight_hash()
    assert other.identity() != tiny_model.identity()
    assert (other.encoder_hash() == tiny_model.encoder_hash()) == (change is other_noise)


def test_the_identity_is_the_same_in_another_folder_and_dtype(tmp_path, tiny_pipeline, tiny_model):
    shutil.copytree(tiny_pipeline, tmp_path / "copy")
    changed_json(tmp_path / "copy/unet/config.json", _diffusers_version="0.1")
    for dtype in ("fp32", "fp16", "bf16"):
        model = load_pipeline(str(tmp_path / "copy"), dtype=dtype)
        assert model.identity() == tiny_model.identity()
        assert model.encoder_hash() == tiny_model.encoder_hash()


def test_the_committed_model_is_still_named_by_its_weights():
    model = load_pipeline(str(ROOT / "data/emoji/pipeline"))
    assert model.identity() == model.weight_hash()


def test_a_tokenizer_of_more_tokens_than_the_text_encoder_takes_is_refused(tmp_path, tiny_pipeline):
    shutil.copytree(tiny_pipeline, tmp_path / "other")
    for length in (17, 10**30, 2):
        changed_json(tmp_path / "other/tokenizer/tokenizer_config.json", model_max_length=length)
        with pytest.raises(UserError, match="model_max_length"):
            load_pipeline(str(tmp_path / "other"))


def test_a_loaded_pipeline_takes_no_parameter_gradients_and_keeps_the_schedule(tiny_model):
    assert not any(p.requires_grad for p in tiny_model.network.parameters())
    torch.testing.assert_close(
        tiny_model.schedule.alpha_bar, build_scheduler().alphas_cumprod.double()
    )
    assert tiny_model.latent_shape == (2, 4, 4) and tiny_model.image_size == 8


def test_prompts_are_padded_and_overlong_ones_cut(tiny_model):
    cond = tiny_model.encode_prompts(["a cat in the style of blob", "", "cat " * 100]).embeddings
    assert cond.shape == (3, 16, 6) and cond.isfinite().all()
    assert not torch.equal(cond[0], cond[1])


def test_pictures_are_encoded_one_by_one_and_without_chance(tiny_model):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    latents = tiny_model.encode_images(images)
    assert latents.shape == (3, 2, 4, 4)
    torch.testing.assert_close(
        tiny_model.encode_images(images[1:2]), latents[1:2], rtol=1e-4, atol=1e-5
    )


def test_generation_equals_the_diffusers_pipeline(tiny_model):
    """Same x_T, prompt, negative prompt and guidance: the same pixels up to rounding."""
    x_T = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    cond, null = tiny_model.encode_prompts(["a cat in the style of blob", "a tree"]).split()
    x0, _ = ddim_sample(GuidedDenoiser(tiny_model, cond, null, 4.0), x_T, 10)
    ours = tiny_model.decode(x0)[0]
    theirs = tiny_model.pipe(
        "a cat in the style of blob",
        negative_prompt="a tree",
        latents=x_T,
        guidance_scale=4.0,
        num_inference_steps=10,
        eta=0.0,
    ).images[0]
    assert ours.size == theirs.size == (8, 8)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="SD_MODEL_PATH"):
            load_pipeline(str(source))


def test_a_pipeline_folder_without_its_weights_is_refused(tmp_path, tiny_pipeline):
    (tmp_path / "model_index.json").write_bytes((tiny_pipeline / "model_index.json").read_bytes())
    with pytest.raises(UserError, match="unet/config.json is missing"):
        load_pipeline(str(tmp_path))


def test_an_unknown_dtype_is_refused(tiny_pipeline):
    with pytest.raises(UserError, match="fp32"):
        load_pipeline(str(tiny_pipeline), dtype="fp8")


@pytest.mark.parametrize("count", range(1, 40))
def test_exactly_the_words_that_do_not_change_the_encoding_are_lost(tiny_model, count):
    words = [("cat", "dog", "blob", "style")[i % 4] for i in range(count)]
    lost = tiny_model.lost_words(" ".join(words)).split()
    kept = words[: len(words) - len(lost)]
    whole = tiny_model.encode_prompts([" ".join(words)]).embeddings
    if lost:  # any other end gives the same: it is not read
        other = tiny_model.encode_prompts([" ".join([*kept, *["dog"] * len(lost)])]).embeddings
        room = tiny_model.pipe.tokenizer.model_max_length
        assert len(tiny_model.pipe.tokenizer(" ".join([*kept, lost[0]])).input_ids) > room
        assert whole.shape == other.shape
    if kept:
        changed = [*kept[:-1], "sun" if kept[-1] != "sun" else "cat"]
        assert not whole.equal(tiny_model.encode_prompts([" ".join([*changed, *lost])]).embeddings)


def test_the_hash_of_the_weights_is_the_same_in_every_dtype(tiny_pipeline, tiny_model):
    for dtype in ("fp16", "bf16"):
        assert load_pipeline(str(tiny_pipeline), "cpu", dtype).weight_hash() == (
            tiny_model.weight_hash()
        )
