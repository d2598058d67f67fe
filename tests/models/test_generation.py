"""Drawing pictures: one noise for a seed, the same picture whatever it is drawn with."""

import pytest
import torch

from concept_trak.models.sample import SamplingSettings, initial_noise, sample

PROMPTS = ["a cat in the style of blob", "a tree", "a dog in the style of line", "a cat", "a dog"]
HOW = SamplingSettings(4.0, 6, "a tree in the style of soft")


def noises(model, seeds):
    return torch.cat([initial_noise(model.latent_shape, seed) for seed in seeds])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_a_picture_does_not_depend_on_its_batch(tiny_model, batch_size):
    x_T = noises(tiny_model, range(5))
    alone = [sample(tiny_model, [p], x_T[i : i + 1], HOW, 1) for i, p in enumerate(PROMPTS)]
    drawn = sample(tiny_model, PROMPTS, x_T, HOW, batch_size)
    assert drawn.shape == (5, 2, 4, 4)
    torch.testing.assert_close(drawn, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_pictures_equal_those_of_the_diffusers_pipeline(tiny_model):
    x_T = noises(tiny_model, [3, 4])
    options = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "latent"}
    options["negative_prompt"] = [HOW.negative_prompt] * 2
    theirs = tiny_model.pipe(PROMPTS[:2], latents=x_T, eta=0.0, **options).images
    ours = sample(tiny_model, PROMPTS[:2], x_T, HOW, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_one_noise_serves_all_prompts(tiny_model):
    x_T = noises(tiny_model, [7])
    shared = sample(tiny_model, PROMPTS, x_T, HOW, 2)
    assert torch.equal(shared, sample(tiny_model, PROMPTS, x_T.expand(5, -1, -1, -1), HOW, 2))
    assert not torch.allclose(shared[0], shared[1])


def test_guidance_and_the_negative_prompt_count(tiny_model):
    x_T = noises(tiny_model, [7])

    def drawn(*how):
        return sample(tiny_model, PROMPTS[:1], x_T, SamplingSettings(*how), 1)

    base = drawn(4.0, 6, "")
    assert torch.equal(base, drawn(4.0, 6)) and not torch.allclose(base, drawn(2.0, 6))
    assert not torch.allclose(base, drawn(4.0, 6, "a tree in the style of soft"))
    # of weight 1 the negative prompt has no part
    assert torch.equal(drawn(1.0, 6), drawn(1.0, 6, "a tree in the style of soft"))


def test_noise_is_that_of_the_seed_in_single_precision():
    x_T = initial_noise((2, 4, 4), 5)
    assert x_T.shape == (1, 2, 4, 4) and x_T.dtype == torch.float32 and x_T.device.type == "cpu"
    torch.manual_seed(5)
    assert torch.equal(x_T[0], torch.randn(2, 4, 4))
    assert not torch.equal(x_T, initial_noise((2, 4, 4), 6))
