"""A class-conditional model answers to what a pipeline answers to, in labels and pixels."""

import numpy as np
import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.gradients.sample_grads import dense
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.class_conditional import (
    NETWORKS,
    Architecture,
    ClassConditional,
    load_class_conditional,
)
from concept_trak.models.load import load_model
from concept_trak.models.vocabulary import Vocabulary

WORDS = {"shape": ("triangle", "circle", "square"), "color": ("red", "blue")}
SIZES = {"size": 8, "patch": 2, "width": 8, "depth": 1, "heads": 2}


@pytest.fixture
def vocabulary():
    return Vocabulary(WORDS)


def small(network, seed=0):
    vocabulary, architecture = Vocabulary(WORDS), Architecture(network, **SIZES)
    model = architecture.build(vocabulary, seed).eval().requires_grad_(False)
    with torch.no_grad():  # what begins as zero would hide what follows it
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return ClassConditional(model, architecture, vocabulary)


def test_a_caption_is_read_as_it_is_written(vocabulary):
    labels = {"shape": "circle", "color": "blue"}
    assert vocabulary.parse(vocabulary.caption(labels)) == labels
    assert vocabulary.parse("Blue , CIRCLE") == labels
    assert vocabulary.parse("") == {} and vocabulary.parse("red") == {"color": "red"}


def test_every_labelling_has_tokens_of_its_own(vocabulary):
    told = [{}, {"shape": "circle"}, {"color": "red"}, {"shape": "circle", "color": "red"}]
    tokens = vocabulary.tokens(vocabulary.indices(told))
    assert tokens.shape == (4, 2, vocabulary.width) and (tokens.sum(2) == 1).all()
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == 4


@pytest.mark.parametrize(
    "caption, named", [("pink", "red"), ("circl", "circle"), ("red, blue", "two of color")]
)
def test_a_caption_that_says_nothing_known_is_refused_by_name(vocabulary, caption, named):
    with pytest.raises(UserError, match=named):
        vocabulary.parse(caption)


@pytest.mark.parametrize(
    "attributes", [{"a": ("x",)}, {"a": ("x", "y"), "b": ("y", "z")}, {"a": ("x y", "z")}]
)
def test_a_vocabulary_in_which_words_are_not_clear_is_refused(attributes):
    with pytest.raises(UserError):
        Vocabulary(attributes)


def test_latents_are_the_pixels():
    model = small("unet")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    latents = model.encode_images(pixels)
    assert tuple(latents.shape[1:]) == model.latent_shape
    assert torch.allclose(
        latents.square().sum(), torch.tensor((pixels / 127.5 - 1) ** 2).sum().float()
    )
    assert np.array_equal(np.stack([np.asarray(p) for p in model.decode(latents)]), pixels)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_saved_model_predicts_the_same(tmp_path, network):
    model = small(network)
    model.save(tmp_path / "model", {})
    again = load_model(str(tmp_path / "model"))
    x, cond = torch.randn(2, *model.latent_shape), model.encode_prompts(["red", "circle, blue"])
    assert torch.equal(model.eps(x, 500, cond), again.eps(x, 500, cond))
    assert again.identity() == model.identity() != small(network, seed=1).identity()


@pytest.mark.parametrize("network", NETWORKS)
def test_labels_change_the_prediction_of_either_network(network):
    model = small(network)
    x = torch.randn(1, *model.latent_shape).expand(3, -1, -1, -1)
    out = model.eps(x, 500, model.encode_prompts(["", "red", "circle, red"]))
    assert len({tuple(o.flatten().tolist()) for o in out}) == 3


@pytest.mark.parametrize("network", NETWORKS)
def test_per_sample_gradients_of_all_weights_equal_autograd(network):
    model = small(network)
    x, v = torch.randn(2, 2, *model.latent_shape)
    cond = model.encode_prompts(["red", "square, blue"])
    with PerSampleVjp(model.network, "weight") as tape:
        with torch.enable_grad():
            found = dense(tape.vjp(model.eps(x, 300, cond), v))
    chosen = [p.requires_grad_() for n, p in model.network.named_parameters() if "weight" in n]
    for i in range(2):
        out = model.eps(x[i : i + 1], 300, cond[i : i + 1])
        wanted = torch.autograd.grad(out, chosen, v[i : i + 1])
        wanted = torch.cat([g.flatten() for g in wanted])
        assert torch.allclose(found[i], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path):
    small("unet").save(tmp_path / "m", {})
    (tmp_path / "m/class_conditional.json").write_text('{"architecture": {"width": 24}}')
    with pytest.raises(UserError, match="no class-conditional model"):
        load_class_conditional(tmp_path / "m")
    with pytest.raises(UserError, match="takes none"):
        small("unet").save(tmp_path / "n", {})
        load_model(str(tmp_path / "n"), lora_path="some.safetensors")
