"""Which pipelines open, LoRAs, and gradients of v-prediction and LoRA models against autograd."""

import importlib.util
import json
import pickle
import shutil

import pytest
import torch
from conftest import GONE, changed, tiny_unet
from oracles import vmap_gradients
from safetensors.torch import load_file, save_file
from torch import nn

from concept_trak.errors import UserError
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.sample_grads import dense
from concept_trak.gradients.select import select_parameters
from concept_trak.gradients.states import noising_schedule, train_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.denoiser import NetworkDenoiser
from concept_trak.models.lora import load_lora, lora_files
from concept_trak.models.sample import SamplingSettings, initial_noise, sample
from concept_trak.models.schedule import VariancePreserving
from concept_trak.models.text_to_image import TextToImage, load_pipeline
from concept_trak.registry import OBJECTIVES
from experiments.emoji.model.pipeline import build_scheduler

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


def batch(n=3):
    g = torch.Generator().manual_seed(0)
    shapes = (n, 2, 4, 4), (n, 16, 6), (n, 2, 4, 4)
    x, cond, v = (torch.randn(shape, generator=g) for shape in shapes)
    return x, Condition(cond), v


# v-prediction


def test_gradients_of_a_v_prediction_model_equal_vmap():
    network, (x, cond, v), t = tiny_unet(), batch(), 700
    schedule = VariancePreserving(build_scheduler().alphas_cumprod, "v_prediction")
    denoiser, a = NetworkDenoiser(network, schedule, (2, 4, 4)), float(schedule.alpha_bar[t])

    def eps(net, x_t, cond):
        return a**0.5 * net(x_t, t, encoder_hidden_states=cond).sample + (1 - a) ** 0.5 * x_t

    with PerSampleVjp(network, "attn2") as tape:
        eps_hat = denoiser.eps(x, t, cond)
        got = dense(tape.vjp(eps_hat, v))
    inputs = x, cond.embeddings
    torch.testing.assert_close(eps_hat, eps(network, *inputs))
    want = vmap_gradients(network, eps, list(tape.parameters), inputs, v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_v_prediction_pipeline_samples_as_in_diffusers_and_gives_rows(tiny_pipeline, tmp_path):
    config = "scheduler/scheduler_config.json"
    folder = changed(tiny_pipeline, tmp_path / "v", config, prediction_type="v_prediction")
    model, caption = load_pipeline(str(folder)), "a cat in the style of blob"
    x_T = initial_noise(model.latent_shape, 0)
    ours = sample(model, [caption], x_T, SamplingSettings(3.0, 8), 1)
    options = {"guidance_scale": 3.0, "num_inference_steps": 8, "eta": 0.0}
    theirs = model.pipe(caption, latents=x_T, output_type="latent", **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    width = PerSampleVjp(model.network, "attn2").input_dim
    maker = GradientComputer(model, make_projection("identity", width, 0, 0), "attn2", True)
    conds = model.encode_prompts([caption, ""]).split()
    for objective in ("dps", "presence"):
        states = train_states_of(model, x_T, *conds, noising_schedule(3))
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
    config = "scheduler/scheduler_config.json"
    short = changed(tiny_pipeline, tmp_path / "p", config, num_train_timesteps=500)
    with pytest.raises(UserError, match="1000 steps"):
        load_pipeline(str(short))


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
    parts = {"unet": (unet, {"lora_alpha": alpha, "target_modules": TARGETS, **options})}
    if text_encoder is not None:
        parts["text_encoder"] = text_encoder, {"lora_alpha": 2, "target_modules": ["q_proj"]}
    saved = {}
    for name, (part, config) in parts.items():
        part.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, **config))
        layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(part))
        saved[f"{name}_lora_layers"] = layers
        saved[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **saved)
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
        got = dense(tape.vjp(lora_model.eps(x, t, cond), v))
    chosen = list(tape.parameters.values())
    for p in chosen:
        p.requires_grad_(True)
    try:
        singles = [slice(i, i + 1) for i in range(len(x))]
        losses = [(lora_model.eps(x[i], t, cond[i]) * v[i]).sum() for i in singles]
        rows = [torch.autograd.grad(loss, chosen) for loss in losses]
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
    both, attn2 = (select_parameters(lora_model.network, name) for name in ("attn2|lora", "attn2"))
    assert len(both) == len(every) + len(attn2)


def test_a_lora_adds_alpha_over_rank_times_b_a(lora_model, tiny_model, lora):
    """UNet and text encoder each predict what they do with W + s B A in place of W."""
    merged = load_pipeline(tiny_model.source)
    for name in ("unet", "text_encoder"):
        part, wrapped = getattr(merged.pipe, name), getattr(lora_model.pipe, name)
        layers = {n: m for n, m in wrapped.named_modules() if hasattr(m, "base_layer")}
        assert layers
        for place, layer in layers.items():
            part.get_submodule(place).weight.data += layer.get_delta_weight("default")
            assert layer.scaling["default"] == (3.0 if name == "unet" else 1.0)
    (x, cond, _), models = batch(), (lora_model, merged, tiny_model)
    got, want, plain = (model.eps(x, 300, cond) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.01
    prompt = ["a cat in the style of blob"]
    got, want, plain = (model.encode_prompts(prompt).embeddings for model in models)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, plain, atol=1e-2)


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
    on_disk = {k: v for k, v in model.network.state_dict().items() if ".lora_" not in k}  # fp16
    wrapped.base_model.model.load_state_dict(on_disk, strict=False)
    x, cond, _ = batch()
    want = wrapped(x, 300, encoder_hidden_states=cond.embeddings).sample
    got = model.eps(x, 300, cond)
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
    prior = {k.replace("unet.", "prior."): v for k, v in state.items()}
    for name, content in {"partly": strangers, "wholly": prior}.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match="LORA_PATH|LoRA"):
            load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / f"{name}.safetensors"))


def test_a_dora_is_refused(tmp_path, tiny_pipeline):
    dora = save_lora(tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match="DoRA"):
        load_pipeline(str(tiny_pipeline), lora_path=str(dora))


def test_a_missing_pickled_or_damaged_lora_is_refused(tmp_path, tiny_pipeline, lora):
    (tmp_path / "folder").mkdir()
    for pickled in (tmp_path / "lora.pt", tmp_path / "folder" / "pytorch_lora_weights.bin"):
        pickled.write_bytes(pickle.dumps({"unet.x": 1}))
    (tmp_path / "damaged.safetensors").write_bytes(b"not a header")
    words_of = {"missing": "does not exist", "lora.pt": "pickle", "folder": "pickle"}
    for path, words in (words_of | {"damaged.safetensors": "not a safetensors file"}).items():
        with pytest.raises(UserError, match=words):
            load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / path))
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "folder" / name)
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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_network_whose_file_lacks_a_weight_is_refused(tmp_path, tiny_pipeline, part):
    shutil.copytree(tiny_pipeline, tmp_path / "other")
    (file,) = (tmp_path / "other" / part).glob("*.safetensors")
    weights = load_file(file)
    for name in (max(weights), min(weights)):
        lacking = {k: v for k, v in weights.items() if k != name}
        for content in (lacking, lacking | {"stranger": weights[name]}):
            save_file(content, file, metadata={"format": "pt"})
            with pytest.raises(UserError, match=f"cannot load .*{part} lacks"):
                load_pipeline(str(tmp_path / "other"))


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("vae/config.json", "layers_per_block", 2**70),
        ("unet/config.json", "layers_per_block", 5000),
        ("unet/config.json", "block_out_channels", [8, 2**40]),
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
    ],
)
def test_a_network_that_would_take_forever_to_build_is_refused_at_once(
    tmp_path, tiny_pipeline, file, key, value
):
    shutil.copytree(tiny_pipeline, tmp_path / "other")
    path = tmp_path / "other" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key}=.* is too large; copy or download the model again"):
        load_pipeline(str(tmp_path / "other"))


# what is read of a folder, and what is wrong with it


def test_a_variant_is_taken_where_the_plain_weights_are_missing_and_said(
    tiny_pipeline, tiny_model, tmp_path, capsys
):
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    for file in (tmp_path / "p").glob("*e*/*.safetensors"):  # of unet/ and vae/ and text_encoder/
        if file.parent.name != "text_encoder":
            file.rename(file.with_suffix(".fp16.safetensors"))
    model = load_pipeline(str(tmp_path / "p"))
    assert model.identity() == tiny_model.identity()
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" is there as fp16 alone")[0][-4:] for line in told] == ["unet", " vae"]


def test_the_conversion_of_a_pickle_that_is_told_makes_the_same_model(
    tiny_pipeline, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(shutil.copytree(tiny_pipeline, tmp_path / "p").parent)
    for file in (tmp_path / "p/unet").glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(UserError, match="as a pickle") as caught:
        load_pipeline("p")
    exec(str(caught.value).partition('python -c "')[2].rstrip('"'), {})
    assert load_pipeline("model").weight_hash() == tiny_model.weight_hash()


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "torch.compile"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "'module.' before their names"),
        (lambda w: w | {"conv_in.bias": w["conv_in.bias"] * float("nan")}, "unet: conv_in.bias"),
        (lambda w: w | {"conv_in.bias": w["conv_in.bias"] + float("inf")}, "NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_used_are_told(tiny_pipeline, tmp_path, change, told):
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    (file,) = (tmp_path / "p/unet").glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=told) as caught:
        load_pipeline(str(tmp_path / "p"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"beta_schedule": "mine"}, "mine"),
        ({"beta_start": 1e-300, "beta_end": 1e-299}, "does not grow"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [-1.0] * 1000}, "does not grow"),
    ],
)
def test_a_schedule_that_is_none_is_told_before_a_network_is_read(
    tiny_pipeline, tmp_path, monkeypatch, values, told
):
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    folder = changed(tiny_pipeline, tmp_path / "p", "scheduler/scheduler_config.json", **values)
    with pytest.raises(UserError, match=f"scheduler: .*{told}"):
        load_pipeline(str(folder))


def test_a_scheduler_without_shares_of_noise_is_refused(tiny_pipeline, tmp_path):
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    folder = changed(tiny_pipeline, tmp_path / "p", "model_index.json", **index)
    with pytest.raises(UserError, match="no noise schedule of 1000 steps"):
        load_pipeline(str(folder))


def test_a_tokenizer_that_names_no_length_has_the_text_encoders(
    tiny_pipeline, tiny_model, tmp_path
):
    file = "tokenizer/tokenizer_config.json"
    folder = changed(tiny_pipeline, tmp_path / "p", file, model_max_length=GONE, max_length=GONE)
    model, caption = load_pipeline(str(folder)), ["a cat in the style of blob"]
    got, want = (m.encode_prompts(caption).embeddings for m in (model, tiny_model))
    assert torch.equal(got, want)


# LoRAs that are none, and other places of theirs

PAIR = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight": (2, 8),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.weight": (8, 2),
}
A, B = PAIR


def pair(**changes):
    return {name: torch.ones(shape) for name, shape in PAIR.items()} | changes


@pytest.fixture(scope="module")
def untouched(tiny_pipeline):
    """A pipeline that no refused LoRA may have changed."""
    pipe = load_pipeline(str(tiny_pipeline)).pipe
    yield pipe
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


@pytest.mark.parametrize(
    "content, told",
    [
        ({}, "holds no weights of a LoRA"),
        ({"lora_unet_x.alpha": torch.tensor(1.0)}, "holds no weights of a LoRA"),
        ({"some.weight": torch.ones(2, 2)}, "holds no weights of a LoRA"),
        ({A: torch.ones(2, 8)}, "without its other half"),
        ({B: torch.ones(8, 2)}, "without its other half"),
        ({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "without its other half"),
        ({"unet.a.processor.to_q_lora.down.weight": torch.ones(2, 2)}, "without its other half"),
        (pair() | {A: torch.ones(2, 8, dtype=torch.int8)}, "int8"),
        (pair() | {A: torch.ones(0, 8)}, r"\[0, 8\]"),
        (pair() | {B: torch.full((8, 2), float("nan"))}, "NaN"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        (pair() | {"lora_unet_x.dora_scale": torch.ones(2)}, "DoRA"),
        (pair() | {"lora_unet_x.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "CP decomposition"),
        (pair() | {"bundle_emb.duck.string_to_param.*": torch.ones(1, 6)}, "words of its own"),
    ],
)
def test_a_file_that_is_no_plain_lora_is_refused_in_our_words(untouched, tmp_path, content, told):
    save_file(content, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        load_lora(untouched, str(tmp_path / "lora.safetensors"))
    assert "LORA_PATH" in str(caught.value) and "lora.safetensors" in str(caught.value)


def peft_folder(folder, values=(), config=(), part="unet"):
    """A LoRA of one layer as `PeftModel.save_pretrained` writes it."""
    of = {"unet": A.removeprefix("unet.")}
    of["text_encoder"] = "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    width = 8 if part == "unet" else 6
    name = f"base_model.model.{of[part]}"
    content = {name: torch.ones(2, width), name.replace("_A", "_B"): torch.ones(width, 2)}
    folder.mkdir(parents=True)
    save_file(content | dict(values), folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q", "q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said | dict(config)))
    return folder


@pytest.mark.parametrize(
    "config, told",
    [
        ({"r": 10**9}, "has the rank 1000000000, its weights 2"),
        ({"r": 0}, "has the rank 0"),
        ({"r": "2"}, "has the rank 2"),
        ({"rank_pattern": {"to_q": 10**9}}, "has the rank 1000000000"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "has the pattern"),
        ({"peft_type": "LOHA"}, "is a LOHA"),
        ({"peft_type": None}, "is a None"),
    ],
)
def test_a_configuration_that_its_weights_do_not_have_is_refused(untouched, tmp_path, config, told):
    with pytest.raises(UserError, match=told):
        load_lora(untouched, str(peft_folder(tmp_path / "lora", config=config)))
    said = {f"unet.{key}": v for key, v in ({"r": 2} | config).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    if "peft_type" not in config:
        save_file(pair(), tmp_path / "one.safetensors", metadata=metadata)
        with pytest.raises(UserError, match=told):
            load_lora(untouched, str(tmp_path / "one.safetensors"))


@pytest.mark.parametrize("alpha", [0, 1e30, "x"])
def test_a_scale_that_is_none_is_refused(tiny_pipeline, tmp_path, alpha):
    folder = peft_folder(tmp_path / "lora", config={"lora_alpha": alpha})
    with pytest.raises(UserError, match="LORA_PATH") as caught:
        load_pipeline(str(tiny_pipeline), lora_path=str(folder))
    assert "multiplies its weights by" in str(caught.value) or alpha == "x"


def test_a_folder_of_unet_and_text_encoder_is_read_whole(tiny_pipeline, tmp_path):
    for part in ("unet", "text_encoder"):
        regex = {"target_modules": r".*attn.*q.*"}  # its weights say which layers it is of
        peft_folder(tmp_path / "lora" / part, config=regex, part=part)
    model = load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / "lora"))
    for part in (model.pipe.unet, model.pipe.text_encoder):
        (layer,) = [m for m in part.modules() if hasattr(m, "base_layer")]
        assert layer.scaling["default"] == 3.0 and layer.lora_B["default"].weight.any()


def test_capitals_in_an_ending_and_a_folder_above_are_known(
    lora, lora_model, tiny_pipeline, tmp_path, capsys
):
    shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "DUCK.SAFETENSORS")
    for path in (tmp_path, tmp_path / "DUCK.SAFETENSORS"):
        model = load_pipeline(str(tiny_pipeline), lora_path=str(path))
        assert model.weight_hash() == lora_model.weight_hash()
    with pytest.raises(UserError, match=f"set LORA_PATH to one below it: {lora}"):
        lora_files(lora.parent)
    save_file(pair() | {B: torch.zeros(8, 2)}, tmp_path / "zero.safetensors")
    load_pipeline(str(tiny_pipeline), lora_path=str(tmp_path / "zero.safetensors"))
    assert "changes nothing that is predicted" in capsys.readouterr().out
