"""What is said of a model before a weight of it is read: its folder, its kind, its files, the hub.

Nothing here loads a network.
"""

import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from conftest import GONE, changed
from safetensors.torch import save_file

from concept_trak.attribution import preflight
from concept_trak.errors import UserError
from concept_trak.models import config_check, hub, schedule
from concept_trak.models.config_check import check_source
from concept_trak.models.model_files import unet_size, weight_files
from concept_trak.settings import resolve


def refused(source):
    with pytest.raises(UserError) as caught:
        check_source(str(source))
    told = str(caught.value)
    assert "\n" not in told and "SD_MODEL_PATH" in told
    return told


# configurations

ODD = [
    ("unet/config.json", "sample_size", [None, [4, 6], [4], "4", True, 0, -4, 4.5, 2**20, GONE]),
    ("unet/config.json", "in_channels", [None, "2", 0, [2], True]),
    ("unet/config.json", "out_channels", [4, None]),
    ("unet/config.json", "cross_attention_dim", [7, None, [6, 7], [], "6", GONE]),
    ("unet/config.json", "num_class_embeds", [10]),
    ("unet/config.json", "encoder_hid_dim", [8]),
    ("unet/config.json", "time_cond_proj_dim", [8]),
    ("unet/config.json", "_class_name", ["UNetMotionModel"]),
    ("vae/config.json", "scaling_factor", [None, 0, -1.0, "0.18", True, [0.18]]),
    ("vae/config.json", "latent_channels", [4, None, "2"]),
    ("vae/config.json", "in_channels", [1, None]),
    ("vae/config.json", "_class_name", ["AutoencoderTiny"]),
    ("text_encoder/config.json", "hidden_size", [12, None, "6"]),
    ("text_encoder/config.json", "max_position_embeddings", [None, 0]),
    ("scheduler/scheduler_config.json", "num_train_timesteps", [500, 10**12, None, "1000"]),
    ("scheduler/scheduler_config.json", "trained_betas", [[0.1] * 3, 3]),
    ("scheduler/scheduler_config.json", "prediction_type", ["sample", "flow", None, 3]),
    ("scheduler/scheduler_config.json", "beta_start", ["x", None, 0, 1.5]),
    ("scheduler/scheduler_config.json", "beta_end", [2, -0.1]),
]


@pytest.mark.parametrize("file, key, values", ODD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_value_that_cannot_be_is_told_before_a_weight_is_read(
    tiny_pipeline, tmp_path, file, key, values
):
    part = file.partition("/")[0]
    for i, value in enumerate(values):
        told = refused(changed(tiny_pipeline, tmp_path / str(i), file, **{key: value}))
        shown = {"trained_betas": "noise schedule", "_class_name": str(value)}.get(key, key)
        shown = {"in_channels": "channels", "out_channels": "channels"}.get(shown, shown)
        shown = {"hidden_size": "cross_attention_dim"}.get(shown, shown) if value == 12 else shown
        shown = {"num_train_timesteps": "timesteps|steps"}.get(shown, shown)
        shown = "latents" if key == "latent_channels" and value == 4 else shown
        assert any(word in told for word in shown.split("|")), (value, told)
        assert part in told or "unet" in told


@pytest.mark.parametrize(
    "file, values",
    [
        ("unet/config.json", {"sample_size": [4, 4]}),
        ("unet/config.json", {"cross_attention_dim": [6, 6]}),
        ("vae/config.json", {"scaling_factor": GONE, "sample_size": None}),
        ("scheduler/scheduler_config.json", {"prediction_type": GONE, "_class_name": "DDPM"}),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModelWithProjection"]}),
        ("model_index.json", {"safety_checker": ["stable_diffusion", "Checker"]}),
        ("model_index.json", {"image_encoder": ["my_code", "Encoder"], "more": 3}),
    ],
)
def test_what_may_be_absent_or_otherwise_is_taken(tiny_pipeline, tmp_path, file, values):
    check_source(str(changed(tiny_pipeline, tmp_path / "p", file, **values)))


@pytest.mark.parametrize(
    "part, given, told",
    [
        ("vae", ["diffusers", "AutoencoderTiny"], "AutoencoderTiny, not"),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"], "AsymmetricAutoencoderKL, not"),
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"], "Projection, not"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "T5EncoderModel, not"),
        ("unet", ["diffusers", "UNet3DConditionModel"], "UNet3DConditionModel, not"),
        ("unet", ["my_code", "UNet2DConditionModel"], "UNet2DConditionModel"),
        ("tokenizer", [None, None], "no tokenizer"),
        ("scheduler", ["my_code", "Scheduler"], "Scheduler"),
        ("text_encoder", GONE, "no text_encoder"),
    ],
)
def test_a_part_of_another_class_is_named(tiny_pipeline, tmp_path, part, given, told):
    found = refused(changed(tiny_pipeline, tmp_path / "p", "model_index.json", **{part: given}))
    assert told in found and part in found


def test_the_checks_know_the_same_number_of_steps_as_the_schedule():
    assert schedule.NUM_TRAIN_TIMESTEPS == config_check.STEPS


# files of weights

U = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "names, variant, files",
    [
        ([f"{U}.safetensors", f"{U}.fp16.safetensors", f"{U}.bin"], "", [f"{U}.safetensors"]),
        ([f"{U}.non_ema.safetensors", f"{U}.fp16.safetensors"], "fp16", [f"{U}.fp16.safetensors"]),
        ([f"{U}.non_ema.safetensors"], "non_ema", [f"{U}.non_ema.safetensors"]),
        ([f"{U}.bin", "adapter.safetensors"], "", []),
        (
            [f"{U}.safetensors.index.json", f"{U}-00001-of-00002.safetensors"]
            + [f"{U}-00002-of-00002.safetensors", f"{U}.fp16-00001-of-00002.safetensors"],
            "",
            [f"{U}.safetensors.index.json"] + [f"{U}-0000{i}-of-00002.safetensors" for i in (1, 2)],
        ),
        (
            [f"{U}.safetensors.index.fp16.json", f"{U}.fp16-00001-of-00001.safetensors"],
            "fp16",
            [f"{U}.safetensors.index.fp16.json", f"{U}.fp16-00001-of-00001.safetensors"],
        ),
    ],
)
def test_the_files_that_are_loaded_are_chosen_among_those_that_are_there(names, variant, files):
    assert weight_files(names, "unet") == (variant, files)


def test_the_size_is_that_of_the_files_that_are_loaded(tiny_pipeline, tmp_path):
    folder, size = tmp_path / "p", unet_size(tiny_pipeline)
    shutil.copytree(tiny_pipeline, folder)
    whole = folder / f"unet/{U}.safetensors"
    for name in (f"{U}.fp16.safetensors", f"{U}.non_ema.safetensors", "old.safetensors"):
        shutil.copy(whole, folder / "unet" / name)
    (folder / f"unet/{U}.bin").write_bytes(b"x" * 100)
    assert unet_size(folder) == size
    whole.unlink()
    assert unet_size(folder) == size
    (folder / f"unet/{U}.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    assert unet_size(folder) is None  # a shard elsewhere
    square = changed(tiny_pipeline, tmp_path / "q", "unet/config.json", sample_size=[4, 4])
    assert unet_size(square) == size


# folders and the hub


@pytest.mark.parametrize(
    "source",
    [
        "/no/model",
        "./model",
        "~/model",
        "models/sub/my_model",
        "model",
        "..",
        "a b/c",
        "a//b",
        "é/x",
    ],
)
def test_what_cannot_be_a_hub_id_is_a_folder_that_is_not_there(source, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "from_hub", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told = refused(source)
    assert "no such folder" in told or source == ".." and "no model_index.json" in told


def test_a_slip_in_a_folders_name_is_told_without_a_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/my_model").mkdir(parents=True)
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    for source in ("models/my_modle", "./models/my_modle"):
        assert "no such folder: " in (told := refused(source))
        assert "(there is models/my_model)" in told


def test_a_single_file_is_told_how_it_becomes_a_folder(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "sd.safetensors")
    assert "from_single_file" in refused(tmp_path / "sd.safetensors")


@pytest.fixture
def own(tiny_data):
    def settings(source):
        words = {"prompt": "a cat in the style of line", "target_concepts": "cat"}
        return resolve("own", {"source_dir": str(tiny_data), "sd_model_path": source, **words})

    return settings


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_without_a_network_the_estimate_names_the_proxy_at_once(
    variable, own, no_cache, monkeypatch
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"http://me:s3cr3t@127.0.0.1:{free.getsockname()[1]}"
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(UserError, match="no such folder: owner/name: set") as caught:
        preflight.estimate_own_data(own("owner/name"))
    told = str(caught.value)
    assert f"proxy 127.0.0.1 (of {variable})" in told and "s3cr3t" not in told


def test_offline_mode_is_respected(own, no_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "check_reachable", None)
    with pytest.raises(UserError, match="no such folder: owner/name, and HF_HUB_OFFLINE"):
        preflight.estimate_own_data(own("owner/name"))


def test_a_model_in_the_cache_is_used_as_it_is_there(own, no_cache, tiny_pipeline, monkeypatch):
    place = no_cache / "models--owner--name"
    shutil.copytree(tiny_pipeline, place / "snapshots/c0ffee")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("c0ffee")
    monkeypatch.setattr(hub, "from_hub", None)
    assert hub.folder_with_weights("owner/name") == place / "snapshots/c0ffee"
    check_source("owner/name")
    here, there = own(str(tiny_pipeline)), own("owner/name")
    assert preflight.network_size(there) == preflight.network_size(here)
    assert preflight.seconds_per_gradient(there) == preflight.seconds_per_gradient(here)


@pytest.fixture
def served(no_cache, tmp_path, monkeypatch):
    """A hub with one repository, a folder of files; what was fetched of it."""
    source, fetched = tmp_path / "repo", []

    def info(self, repo, timeout):
        files = (p for p in sorted(source.rglob("*")) if p.is_file())
        names = [SimpleNamespace(rfilename=str(p.relative_to(source))) for p in files]
        return SimpleNamespace(siblings=names)

    def download(repo, allow_patterns):
        target = no_cache / "models--owner--name/snapshots/c0ffee"
        for name in allow_patterns:
            fetched.append(name)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        (target.parents[1] / "refs").mkdir(exist_ok=True)
        (target.parents[1] / "refs/main").write_text("c0ffee")
        return str(target)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "check_reachable", lambda *_: None)
    return source, fetched


def test_of_the_hub_no_weight_is_fetched_before_the_kind_is_known(served, tiny_pipeline):
    source, fetched = served
    changed(tiny_pipeline, source, "model_index.json", _class_name="StableDiffusionXLPipeline")
    assert "owner/name is a StableDiffusionXLPipeline" in refused("owner/name")
    assert fetched and not any(name.endswith(".safetensors") for name in fetched)


def test_of_the_hub_only_what_is_read_is_fetched(served, tiny_pipeline):
    source, fetched = served
    shutil.copytree(tiny_pipeline, source)
    (source / "safety_checker").mkdir()
    for name in ("safety_checker/model.safetensors", f"unet/{U}.bin", "sd-v1-4.ckpt", "a.png"):
        (source / name).write_bytes(b"x")
    shutil.copy(source / f"unet/{U}.safetensors", source / f"unet/{U}.fp16.safetensors")
    (source / f"vae/{U}.safetensors").rename(source / f"vae/{U}.fp16.safetensors")
    folder = hub.folder_with_weights("owner/name")
    weights = {name for name in fetched if not name.endswith(hub.TEXTS)}
    plain = {f"unet/{U}.safetensors", "text_encoder/model.safetensors"}
    assert weights == plain | {f"vae/{U}.fp16.safetensors"}
    assert folder == hub.folder_with_weights("owner/name") == check_source("owner/name")


@pytest.mark.parametrize("kept", [{}, {"variant": "fp16"}])
def test_a_pickle_alone_is_told_with_its_conversion(served, tiny_pipeline, tmp_path, kept):
    source, _ = served
    shutil.copytree(tiny_pipeline, source)
    (source / f"unet/{U}.safetensors").unlink()
    (source / f"unet/{U}{'.fp16' if kept else ''}.bin").write_bytes(b"x")
    for name in ("owner/name", str(source)):
        with pytest.raises(UserError, match=f"pickle .unet/{U}.*python -c") as caught:
            hub.folder_with_weights(name)
        assert f"from_pretrained('{name}'" in str(caught.value)
        assert ("variant='fp16'" in str(caught.value)) == bool(kept)


@pytest.mark.parametrize(
    "error, told",
    [
        ("RepositoryNotFoundError", "no such folder: owner/name, and .* has no model owner/name"),
        ("GatedRepoError", "accepted its terms"),
        ("HfHubHTTPError", "cannot be asked for it"),
        ("TimeoutError", "cannot be asked for it .TimeoutError"),
    ],
)
def test_what_the_hub_says_no_to_is_one_line(served, monkeypatch, error, told):
    def fail(*_, **__):
        raise type(error, (Exception,), {})("s3://a:s3cr3t@b" if error.startswith("Hf") else "")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(UserError, match=told) as caught:
        check_source("owner/name")
    assert "s3cr3t" not in str(caught.value) and "\n" not in str(caught.value)
