"""What is told before anything is loaded: mistakes, and what a run will take."""

import contextlib
import shutil
from collections import namedtuple

import numpy as np
import pytest

from concept_trak import cli
from concept_trak.attribution import preflight
from concept_trak.attribution.naming import store_name
from concept_trak.errors import UserError
from concept_trak.models.model_files import unet_size
from concept_trak.settings import ROOT, resolve
from concept_trak.store.store import Layout, Store


def test_the_size_of_the_network_is_read_from_headers(tiny_pipeline, tiny_model, tmp_path):
    parameters = sum(p.numel() for p in tiny_model.pipe.unet.parameters())
    assert unet_size(tiny_pipeline) == (parameters, 4)
    assert unet_size(tmp_path) is None
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"sample_size": 4}')
    (tmp_path / "unet/a.safetensors").write_bytes(b"\xff" * 8)
    assert unet_size(tmp_path) is None


def test_the_estimate_is_that_of_the_two_networks_that_were_measured():
    embedded = preflight.seconds_per_gradient(resolve("emoji", {}))
    assert embedded == pytest.approx(preflight.SECONDS, rel=0.02)
    hub = preflight.seconds_per_gradient(
        resolve("own", {})
    )  # five levels: 16 passes of the fit, 6 a state
    assert hub == pytest.approx(9.5 * (16 + 6 * 4), rel=0.1)


def test_durations_read_well():
    said = [preflight.duration(s) for s in (0.1, 80, 300, 9000, 3 * 86400)]
    assert said == ["1 s", "80 s", "5 min", "2.5 h", "3 days"]


def own(folder, tiny_pipeline, **changes):
    words = {"prompt": "a cat in the style of line", "target_concepts": "cat"}
    return resolve(
        "own", {"source_dir": str(folder), "sd_model_path": str(tiny_pipeline), **words, **changes}
    )


def test_own_pictures_are_told_their_price_and_refused_before_it_is_paid(
    tiny_data, tiny_pipeline, monkeypatch
):
    told = preflight.estimate_own_data(own(tiny_data, tiny_pipeline))
    assert told.startswith("11 pictures: about 1 s on two CPU cores, at most 2 MB on disk")
    for changes, word in (
        ({"target_concepts": "dog"}, "not in the prompt"),
        ({"sd_model_path": "/no/model"}, "/no/model"),
        ({"source_dir": "/no/pictures"}, "/no/pictures"),
    ):
        with pytest.raises(UserError, match=word):
            preflight.estimate_own_data(own(tiny_data, tiny_pipeline, **changes))
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(9, 9, 1000))
    with pytest.raises(UserError, match="11 pictures take at most 2 MB on disk .0 MB free"):
        preflight.estimate_own_data(own(tiny_data, tiny_pipeline))


def test_the_early_checks_know_the_same_files_as_those_that_read_them():
    from concept_trak.datasets import encoded

    assert preflight.LATENTS == encoded.LATENTS and (ROOT / "data/emoji/pipeline/unet").is_dir()


@pytest.mark.parametrize(
    "count, split, shards", [(3, 4, 3), (1, 16, 1), (4, 4, 4), (900, 4, 4), (0, 4, 4)]
)
def test_a_default_makes_no_more_shards_than_there_are_pictures(count, split, shards):
    settings = resolve("own", {"num_split": split})
    assert preflight.with_shards(settings, count, given=False).num_split == shards
    if shards == split:
        assert preflight.with_shards(settings, count, given=True) == settings
    else:
        with pytest.raises(UserError, match=f"NUM_SPLIT={split} is more than the {count} training"):
            preflight.with_shards(settings, count, given=True)


@pytest.mark.parametrize("verb", ["estimate", "prepare", "train-grad"])
def test_more_shards_than_pictures_are_refused_at_the_first_step(
    verb, tiny_data, tiny_pipeline, tmp_path, capsys
):
    words = ["--prompt=a cat in the style of line", "--target-concepts=cat", "--benchmark=own"]
    flags = [*words, f"--sd-model-path={tiny_pipeline}", "--num-split=12"]
    where = "data" if verb == "train-grad" else "source"
    flags += [f"--{where}-dir={tiny_data}", f"--grad-dir={tmp_path}"]
    assert cli.main([verb, *flags]) == 2
    told = capsys.readouterr().err
    assert "NUM_SPLIT=12 is more than the 11 training pictures" in told and told.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("rows, num_train, known", [(5, 0, 5), (5, 3, 3), (5, 9, 5), (0, 7, 7)])
def test_encoded_pictures_are_counted(tmp_path, rows, num_train, known):
    (tmp_path / preflight.LATENTS).touch()
    if rows:
        np.save(tmp_path / preflight.TEXT, np.zeros((rows, 2, 3), np.float32))
    settings = resolve("own", {"data_dir": str(tmp_path), "num_train": num_train})
    assert preflight.number_of_pictures(settings) == known


@pytest.mark.parametrize("modules, given, said", [
    ([64] * 4, "50KB", "4 blocks of up to 64 features need 0.295 MB of the 0.05 MB of MAX_MEMORY"),
    ([256], "50KB", "18 x 1000 scores take 0.072 MB of the 0.05 MB of MAX_MEMORY"),
])  # fmt: skip
def test_too_little_memory_is_told_before_the_model_is_loaded(tmp_path, modules, given, said):
    s = resolve("emoji", {"grad_dir": str(tmp_path), "data_dir": str(tmp_path)})
    projection = {"kind": "logra", "blocks": len(modules), "modules": modules}
    layout = Layout(1000, 256, 2, "float16")
    Store.create(tmp_path / store_name(s), layout, {"projection": projection}, {})
    preflight.check_memory(s)
    preflight.check_memory(s.but(max_memory="500KB"))
    with pytest.raises(UserError, match=said):
        preflight.check_memory(s.but(max_memory=given))
    index = s.but(max_memory=given, search="index")  # scores candidates alone
    with pytest.raises(UserError) if len(modules) > 1 else contextlib.nullcontext():
        preflight.check_memory(index)
