"""Encoding a folder once: the arrays, their bytes, and when they are made again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_trak.datasets import prepare as module
from concept_trak.datasets.encoded import LATENTS, PREPARED, TEXT, EncodedData
from concept_trak.datasets.folder import load_folder
from concept_trak.datasets.prepare import ArrayFile, prepare
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import load_pipeline
from concept_trak.settings import resolve


@pytest.fixture
def settings(tmp_path, tiny_data, tiny_pipeline):
    given = {"source_dir": str(tiny_data), "data_dir": str(tmp_path / "encoded")}
    given |= {"sd_model_path": str(tiny_pipeline), "batch_size": 4}
    return resolve("own", given).on("cpu")


def test_both_arrays_hold_what_the_model_encodes(settings, tiny_data, tiny_model):
    folder, data = prepare(settings, "cpu"), load_folder(tiny_data).split("train")
    assert sorted(p.name for p in folder.iterdir()) == sorted([LATENTS, TEXT, PREPARED])
    pixels, n = data.images(range(len(data)), size=8), len(data)
    want = torch.cat([tiny_model.encode_images(x) for x in (pixels, pixels[:, :, ::-1])])
    latents = np.load(folder / LATENTS)
    assert latents.dtype == np.float16 and len(latents) == 2 * n == 22
    np.testing.assert_allclose(latents, want, rtol=2e-3, atol=2e-3)
    text = tiny_model.encode_prompts(data.captions).embeddings
    np.testing.assert_allclose(np.load(folder / TEXT), text, rtol=2e-3, atol=2e-3)
    x0, cond = EncodedData(folder, tiny_model).batch(range(3, 7))
    assert np.array_equal(x0, latents[3:7]) and cond.embeddings.shape == (4, 16, 6)


def test_rows_written_in_any_order_are_the_bytes_of_numpy(tmp_path):
    values = np.random.default_rng(0).standard_normal((7, 2, 3)).astype(np.float16)
    np.save(tmp_path / "numpy.npy", values)
    with open(tmp_path / "ours.npy", "wb") as file:
        array = ArrayFile(file, values.shape)
        for start, stop in ((5, 7), (0, 2), (2, 5)):
            array.write(start, torch.from_numpy(values[start:stop]))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_what_was_prepared_is_kept_until_the_source_changes(settings, tmp_path, monkeypatch):
    folder = prepare(settings, "cpu")
    monkeypatch.setattr(module, "encode", lambda *_: pytest.fail("encoded again"))
    assert prepare(settings, "cpu") == folder
    record = json.loads((folder / PREPARED).read_text())
    (folder / PREPARED).write_text(json.dumps(record | {"pictures": "others"}))
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        prepare(settings, "cpu")


def test_a_killed_run_leaves_no_array_and_no_record(settings, tmp_path, monkeypatch):
    write = ArrayFile.write

    def dying(self, start, rows):
        if start == 8:
            raise KeyboardInterrupt
        write(self, start, rows)

    monkeypatch.setattr(ArrayFile, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, "cpu")
    assert not list((tmp_path / "encoded").iterdir())


def test_numbers_beyond_float16_and_a_small_disk_are_refused(settings, tmp_path, monkeypatch):
    with open(tmp_path / "a.npy", "wb") as file, pytest.raises(UserError, match="DTYPE=fp32"):
        ArrayFile(file, (1, 2)).write(0, torch.tensor([[1.0, 1e6]]))
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="MB are needed"):
        prepare(settings, "cpu")


@pytest.fixture
def own(tmp_path, settings, tiny_data):
    """(prepared settings, their source: a copy of the pictures)."""
    source = tmp_path / "own"
    shutil.copytree(tiny_data, source)
    changed = settings.but(source_dir=str(source))
    prepare(changed, "cpu")
    return changed, source


def lines_of(source):
    return (source / "metadata.jsonl").read_text().splitlines(keepends=True)


def test_rows_keep_their_pictures_when_the_metadata_is_reordered(own, tiny_model, tiny_data):
    settings, source = own
    before = load_folder(tiny_data).split("train")
    (source / "metadata.jsonl").write_text("".join(reversed(lines_of(source))))
    assert load_folder(source).split("train").captions != before.captions
    found = EncodedData(settings.data_dir, tiny_model).pictures
    assert found.captions == before.captions
    assert (found.images(range(11)) == before.images(range(11))).all()


def another_caption(source):
    lines = lines_of(source)
    (source / "metadata.jsonl").write_text("".join(lines).replace("a cat in", "the cat in"))


def another_picture(source):
    first, second = sorted(source.glob("*.png"))[-2:]
    first.write_bytes(second.read_bytes())


def captions_exchanged(source):
    records = [json.loads(line) for line in lines_of(source)]
    records[-1]["text"], records[-2]["text"] = records[-2]["text"], records[-1]["text"]
    (source / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize("change", [another_caption, another_picture, captions_exchanged])
def test_a_picture_or_caption_that_was_changed_since_is_told(own, tiny_model, change):
    settings, source = own
    change(source)
    with pytest.raises(UserError, match="was changed since.*run_prepare.sh"):
        EncodedData(settings.data_dir, tiny_model).pictures  # noqa: B018
    prepare(settings, "cpu")
    assert len(EncodedData(settings.data_dir, tiny_model).pictures) == 11


@pytest.mark.parametrize("name", [LATENTS, TEXT])
def test_an_array_that_was_replaced_is_encoded_again(own, name):
    settings, _ = own
    path = Path(settings.data_dir) / name
    good = path.read_bytes()
    np.save(path, np.zeros_like(np.load(path)))
    prepare(settings, "cpu")
    assert path.read_bytes() == good


def test_a_record_of_another_version_asks_to_prepare_again(own, tiny_model):
    settings, _ = own
    path = Path(settings.data_dir) / PREPARED
    record = json.loads(path.read_text())
    del record["digests"]
    for content in (json.dumps(record), "[1]", "", "{"):
        path.write_text(content)
        with pytest.raises(UserError, match="run_prepare.sh"):
            EncodedData(settings.data_dir, tiny_model).pictures  # noqa: B018


def test_a_picture_added_is_encoded_with_its_neighbours_and_the_others_are_copied(
    own, tmp_path, monkeypatch
):
    settings, source = own
    added = json.loads(lines_of(source)[-1]) | {"text": "the tree in the style of soft"}
    with (source / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(added) + "\n")
    fresh, made, seen = settings.but(data_dir=str(tmp_path / "fresh")), module.encoded, []
    prepare(fresh, "cpu")
    monkeypatch.setattr(module, "encoded", lambda *a: seen.append(a[2]) or made(*a))
    prepare(settings, "cpu")
    assert seen == [range(8, 12)]  # the last step of four
    for name in (LATENTS, TEXT):
        one, other = (Path(s.data_dir) / name for s in (settings, fresh))
        assert one.read_bytes() == other.read_bytes()


def rescaled(settings, folder):
    """The settings' pipeline with another scale of its latents."""
    shutil.copytree(settings.sd_model_path, folder)
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    return str(folder)


@pytest.mark.parametrize("which", ["dtype", "model"])
def test_what_another_model_or_dtype_encoded_is_not_copied(own, tmp_path, monkeypatch, which):
    settings, _ = own
    change = {"dtype": "bf16"}
    if which == "model":
        change = {"sd_model_path": rescaled(settings, tmp_path / "other")}
    seen, made = [], module.encoded
    monkeypatch.setattr(module, "encoded", lambda *a: seen.append(a[2]) or made(*a))
    prepare(settings.but(**change), "cpu")
    assert len(seen) == 3


def test_rows_that_another_model_encoded_are_refused(own, tmp_path):
    settings, _ = own
    other = load_pipeline(rescaled(settings, tmp_path / "other"))
    with pytest.raises(UserError, match="encoded by another model.*run_prepare.sh"):
        EncodedData(settings.data_dir, other).pictures  # noqa: B018


def test_a_changed_record_of_checksums_is_made_again(own, tiny_model):
    settings, _ = own
    data = EncodedData(settings.data_dir, tiny_model)
    wanted, path = data.content_hash(), Path(settings.data_dir) / ".content.json"
    record = json.loads(path.read_text())
    record["checksums"][LATENTS] = "0" * 64
    for content in (json.dumps(record), "[]", "{", ""):
        path.write_text(content)
        assert EncodedData(settings.data_dir, tiny_model).content_hash() == wanted


def test_every_row_of_an_array_enters_the_content_hash(own, tiny_model):
    settings, _ = own
    path = Path(settings.data_dir) / TEXT
    seen = {EncodedData(settings.data_dir, tiny_model).content_hash()}
    for row in range(11):
        array = np.load(path)
        array[row] += 1
        np.save(path, array)
        seen.add(EncodedData(settings.data_dir, tiny_model).content_hash())
    assert len(seen) == 12
