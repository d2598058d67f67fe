"""Which pipelines open, LoRAs, and gradients of v-prediction and LoRA models against autograd."""

import importlib.util
import json
import pickle
import shutil

import pytest
import torch
from conftest import tiny_unet
from oracles import vmap_gradients
from safetensors.torch import load_file, save_file
from torch import nn

from concept_trak.errors import UserError
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import Guided, ddim_sample
from concept_trak.models.denoiser import NetworkDenoiser
from concept_trak.models.schedule import VariancePreserving
from concept_trak.models.text_to_image import TextToImage, load_pipeline
from concept_trak.registry import OBJECTIVES
from concept_trak.rows.projection import make_projection
from concept_trak.rows.row import RowMaker
from concept_trak.rows.states import noised_states, train_states_of
from concept_trak.rows.vjp import PerSampleVjp, dense, select_parameters
from concept_trak.workshop.embedded.pipeline import build_scheduler

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


def changed(source, folder, file, **values):
    """A copy of a pipeline folder with other values in one of its JSON files, weights linked."""
    shutil.copytree(source, folder, copy_function=lambda a, b: shutil.os.link(a, b))
    path = folder / file
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(content | values))
    return folder


def batch(n=3):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 2, 4, 4, generator=g),
        torch.randn(n, 16, 6, generator=g),
        torch.randn(n, 2, 4, 4, generator=g),
    )


# v-prediction


def test_gradients_of_a_v_prediction_model_equal_vmap():
    network, (x, cond, v), t = tiny_unet(), batch(), 700
    schedule = VariancePreserving(build_scheduler().alphas_cumprod, "v_prediction")
    denoiser, a = NetworkDenoiser(network, schedule, (2, 4, 4)), float(schedule.alpha_bar[t])

    def eps(net, x_t, cond):
        return a**0.5 * net(x_t, t, encoder_hidden_states=cond).sample + (1 - a) ** 0.5 * x_t

    with PerSampleVjp(network, "attn2") as tape:
        eps_hat = denoiser.eps(x, t, Condition(cond))
        got = dense(tape.vjp(eps_hat, v))
    torch.testing.assert_close(eps_hat, eps(network, x, cond))
    want = vmap_gradients(network, eps, list(tape.parameters), (x, cond), v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_v_prediction_pipeline_samples_as_in_diffusers_and_gives_rows(tiny_pipeline, tmp_path):
    model = load_pipeline(
        str(
            changed(
                tiny_pipeline,
                tmp_path / "v",
                "scheduler/scheduler_config.json",
                prediction_type="v_prediction",
            )
        )
    )
    x_T = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    cond, null = model.encode_prompts(["a cat in the style of blob", ""]).split()
    ours, _ = ddim_sample(Guided(model, cond, null, 3.0), x_T, 8)
    theirs = model.pipe(
        "a cat in the style of blob",
        latents=x_T,
        guidance_scale=3.0,
        num_inference_steps=8,
        eta=0.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    projection = make_projection(
        "identity", PerSampleVjp(model.network, "attn2").input_dim, 0, 0, "cpu"
    )
    for objective in ("dps", "presence"):
        states = train_states_of(model, x_T, cond, null, noised_states(3))
        maker = RowMaker(model, projection, "attn2", True)
        rows = maker.rows(states, OBJECTIVES.get(objective).cotangent, 1).values
        assert rows.isfinite().all() and rows.norm() > 0


# models of other kinds


@pytest.mark.parametrize(
    "name, needs",
    [
        ("StableDiffusionXLPipeline", "time ids"),
        ("StableDiffusion3Pipeline", "velocity-to-eps"),
        ("FluxPipeline", "joint attention"),
        ("StableDiffusionInpaintPipeline", "9 input channels"),
        ("KandinskyPipeline", "not known here"),
        (["custom", "Pipeline"], "not known here"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused_with_what_it_would_need(tmp_path, name, needs):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=needs) as caught:
        load_pipeline(str(tmp_path))
    assert "SD_MODEL_PATH" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_model_of_another_kind_is_refused_by_its_downloaded_index(tmp_path, monkeypatch):
    from diffusers import configuration_utils

    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    monkeypatch.setattr(configuration_utils, "hf_hub_download", lambda *_, **__: str(index))
    with pytest.raises(UserError, match="owner/name is a StableDiffusionXLPipeline"):
        load_pipeline("owner/name")


@pytest.mark.parametrize(
    "values, needs",
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"in_channels": 9}, "9 input channels"),
    ],
)
def test_a_unet_with_further_inputs_is_refused(tiny_pipeline, tmp_path, values, needs):
    with pytest.raises(UserError, match=needs):
        load_pipeline(str(changed(tiny_pipeline, tmp_path / "p", "unet/config.json", **values)))


def test_another_length_of_the_noise_schedule_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="1000 steps"):
        load_pipeline(
            str(
                changed(
                    tiny_pipeline,
                    tmp_path / "p",
                    "scheduler/scheduler_config.json",
                    num_train_timesteps=500,
                )
            )
        )


# LoRA


def save_lora(folder, alpha=6, width=6, text_encoder=None, **options):
    """A LoRA of the tiny UNet (and a text encoder) in diffusers' layout; B is not zero."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers

    torch.manual_seed(5)
    unet = tiny_unet()
    if width != 6:
        unet = UNet2DConditionModel.from_config({**unet.config, "cross_attention_dim": width})
    unet.add_adapter(
        peft.LoraConfig(
            r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=TARGETS, **options
        )
    )
    layers = {
        "unet_lora_layers": convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    }
    metadata = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    if text_encoder is not None:
        text_encoder.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj"])
        )
        metadata["text_encoder_lora_adapter_metadata"] = text_encoder.peft_config[
            "default"
        ].to_dict()
        layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(
            peft.get_peft_model_state_dict(text_encoder)
        )
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_pipeline):
    text_encoder = load_pipeline(str(tiny_pipeline)).pipe.text_encoder
    return save_lora(tmp_path_factory.mktemp("lora") / "lora", text_encoder=text_encoder)


@pytest.fixture(scope="module")
def lora_model(lora, tiny_pipeline):
    return load_pipeline(str(tiny_pipeline), lora_path=str(lora))


@pytest.mark.parametrize("layer", ["attn2", "lora", "attn2|to_v.lora", ""])
def test_gradients_of_a_lora_model_equal_autograd_sample_by_sample(lora_model, layer):
    (x, cond, v), t = batch(), 300
    network = lora_model.network
    with PerSampleVjp(network, layer) as tape, torch.enable_grad():
        got = dense(tape.vjp(lora_model.eps(x, t, Condition(cond)), v))
    chosen = list(tape.parameters.values())
    for p in chosen:
        p.requires_grad_(True)
    try:
        rows = [
            torch.autograd.grad(
                (lora_model.eps(x[i : i + 1], t, Condition(cond[i : i + 1])) * v[i : i + 1]).sum(),
                chosen,
            )
            for i in range(len(x))
        ]
    finally:
        network.requires_grad_(False)
    want = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert got.shape == want.shape and want.norm(dim=1).min() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_layer_means_the_same_coordinates_with_and_without_a_lora(lora_model, tiny_model):
    for layer in ("attn2", "attn2.to_q.weight|to_k", "conv1", ""):
        base, wrapped = (select_parameters(m.network, layer) for m in (tiny_model, lora_model))
        assert list(base) == [n.replace(".base_layer.", ".") for n in wrapped]
        assert [p.shape for p in base.values()] == [p.shape for p in wrapped.values()]
        assert all(torch.equal(a, b) for a, b in zip(base.values(), wrapped.values(), strict=True))


def test_lora_weights_are_selected_by_name(lora_model):
    every = select_parameters(lora_model.network, "lora")
    assert every and all(".lora_A." in n or ".lora_B." in n for n in every)
    some = select_parameters(lora_model.network, "attn2.to_v.lora")
    assert some and all("attn2.to_v.lora" in n for n in some) and len(some) < len(every)
    assert len(select_parameters(lora_model.network, "attn2|lora")) == len(every) + len(
        select_parameters(lora_model.network, "attn2")
    )


def test_a_lora_adds_alpha_over_rank_times_b_a(lora_model, tiny_model, lora):
    """UNet and text encoder each predict what they do with W + s B A in place of W."""
    merged = load_pipeline(tiny_model.source)
    for part, wrapped in (
        (merged.pipe.unet, lora_model.pipe.unet),
        (merged.pipe.text_encoder, lora_model.pipe.text_encoder),
    ):
        layers = {n: m for n, m in wrapped.named_modules() if hasattr(m, "base_layer")}
        assert layers
        for name, layer in layers.items():
            part.get_submodule(name).weight.data += layer.get_delta_weight("default")
            assert layer.scaling["default"] == (3.0 if part is merged.pipe.unet else 1.0)
    x, cond, _ = batch()
    cond = Condition(cond)
    torch.testing.assert_close(
        lora_model.eps(x, 300, cond), merged.eps(x, 300, cond), rtol=1e-4, atol=1e-4
    )
    assert (lora_model.eps(x, 300, cond) - tiny_model.eps(x, 300, cond)).abs().max() > 0.01
    prompt = ["a cat in the style of blob"]
    torch.testing.assert_close(
        lora_model.encode_prompts(prompt).embeddings,
        merged.encode_prompts(prompt).embeddings,
        rtol=1e-3,
        atol=1e-3,
    )
    assert not torch.allclose(
        lora_model.encode_prompts(prompt).embeddings,
        tiny_model.encode_prompts(prompt).embeddings,
        atol=1e-2,
    )


def test_a_loaded_lora_is_frozen_in_the_models_dtype_and_in_eval_mode(
    lora, tiny_pipeline, lora_model
):
    model = load_pipeline(str(tiny_pipeline), dtype="bf16", lora_path=str(lora))
    for part in (model.pipe.unet, model.pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in part.parameters()) and not any(
            m.training for m in part.modules()
        )
    assert model.encode_prompts(["a cat"]).embeddings.dtype == torch.bfloat16


def test_the_lora_and_its_scale_enter_the_weight_hash(lora_model, tiny_model, lora, tiny_pipeline):
    again = load_pipeline(
        str(tiny_pipeline), dtype="fp16", lora_path=str(lora / "pytorch_lora_weights.safetensors")
    )
    assert again.weight_hash() == lora_model.weight_hash() != tiny_model.weight_hash()
    layer = next(m for m in again.network.modules() if hasattr(m, "base_layer"))
    layer.scaling["default"] *= 2
    assert TextToImage(again.pipe, again.source).weight_hash() != again.weight_hash()


def test_a_folder_saved_by_peft_is_read_with_its_own_rank_and_alpha(tmp_path, tiny_pipeline):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, use_rslora=True, init_lora_weights=False, target_modules=TARGETS
    )
    wrapped = peft.get_peft_model(tiny_unet(), config)
    wrapped.save_pretrained(tmp_path / "peft")
    model = load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / "peft"))
    wrapped.base_model.model.load_state_dict(
        {k: v for k, v in model.network.state_dict().items() if ".lora_" not in k}, strict=False
    )  # fp16 on disk
    x, cond, _ = batch()
    want = wrapped(x, 300, encoder_hidden_states=cond).sample
    got = model.eps(x, 300, Condition(cond))
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_a_kohya_file_is_read_with_its_alpha(tmp_path, tiny_pipeline, lora):
    state = {}
    for name, value in load_file(lora / "pytorch_lora_weights.safetensors").items():
        if not name.startswith("unet.") or "attn2" not in name:
            continue
        layer, _, kind = name.removeprefix("unet.").partition(".lora")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{layer}.lora_{'down' if kind.startswith(('_A', '.down')) else 'up'}.weight"] = value
        state[f"{layer}.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "kohya.safetensors")
    model = load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / "kohya.safetensors"))
    layers = [m for m in model.network.modules() if hasattr(m, "base_layer")]
    assert 3 * len(layers) == len(state) and {m.scaling["default"] for m in layers} == {3.0}


def test_a_lora_of_another_model_is_refused(tmp_path, tiny_pipeline, lora):
    wide = save_lora(tmp_path / "wide", width=10)
    with pytest.raises(UserError, match="LORA_PATH") as caught:
        load_pipeline(str(tiny_pipeline), lora_path=str(wide))
    assert "\n" not in str(caught.value)
    state = load_file(lora / "pytorch_lora_weights.safetensors")
    strangers = {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in state.items()}
    for name, content in {
        "partly": strangers,
        "wholly": {k.replace("unet.", "prior."): v for k, v in state.items()},
    }.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match="LORA_PATH|LoRA"):
            load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / f"{name}.safetensors"))


def test_a_dora_is_refused(tmp_path, tiny_pipeline):
    with pytest.raises(UserError, match="DoRA"):
        load_pipeline(
            str(tiny_pipeline), lora_path=str(save_lora(tmp_path / "dora", use_dora=True))
        )


def test_a_missing_pickled_or_damaged_lora_is_refused(tmp_path, tiny_pipeline, lora):
    (tmp_path / "folder").mkdir()
    for pickled in (tmp_path / "lora.pt", tmp_path / "folder" / "pytorch_lora_weights.bin"):
        pickled.write_bytes(pickle.dumps({"unet.x": 1}))
    (tmp_path / "damaged.safetensors").write_bytes(b"not a header")
    for path, words in {
        "missing": "does not exist",
        "lora.pt": "pickle",
        "folder": "pickle",
        "damaged.safetensors": "cannot use",
    }.items():
        with pytest.raises(UserError, match=words):
            load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / path))
    for name in ("a", "b"):
        shutil.copy(
            lora / "pytorch_lora_weights.safetensors", tmp_path / "folder" / f"{name}.safetensors"
        )
    with pytest.raises(UserError, match="2 safetensors files"):
        load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / "folder"))


def test_without_peft_the_message_says_how_to_install_it(tmp_path, tiny_pipeline, monkeypatch):
    save_file({"unet.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    with pytest.raises(UserError, match="pip install peft"):
        load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / "lora.safetensors"))


def test_a_name_with_lora_in_a_model_without_one_is_refused():
    with pytest.raises(UserError, match="matches no parameter"):
        PerSampleVjp(nn.Sequential(nn.Linear(2, 2)), "lora")
