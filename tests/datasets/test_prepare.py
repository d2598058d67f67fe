"""Encoding a folder once: the arrays, their bytes, and when they are made again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_trak.atomic_io import PART
from concept_trak.datasets import prepare as module
from concept_trak.datasets.encoded import LATENTS, PREPARED, TEXT, EncodedData
from concept_trak.datasets.image_folder import load_folder
from concept_trak.datasets.prepare import EncodedWriter, prepare
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


def test_steps_written_in_any_order_are_the_bytes_of_numpy(tmp_path):
    rng = np.random.default_rng(0)
    plain, mirrored = rng.standard_normal((2, 7, 2, 3, 3)).astype(np.float16)
    text = rng.standard_normal((7, 5, 4)).astype(np.float16)
    np.save(tmp_path / "latents.npy", np.concatenate([plain, mirrored]))
    np.save(tmp_path / "text.npy", text)
    with EncodedWriter(tmp_path, {}, ((2, 3, 3), (5, 4))) as parts:
        parts.open()
        for rows in (range(5, 7), range(0, 2), range(2, 5)):
            part = slice(rows.start, rows.stop)
            given = [torch.from_numpy(x[part].copy()) for x in (plain, mirrored, text)]
            parts.write(rows, ["x"], given)
        parts.finish(7, {})
    for ours, numpy in ((LATENTS, "latents.npy"), (TEXT, "text.npy")):
        assert (tmp_path / ours).read_bytes() == (tmp_path / numpy).read_bytes()


def test_what_was_prepared_is_kept_until_the_source_changes(settings, tmp_path, monkeypatch):
    folder = prepare(settings, "cpu")
    monkeypatch.setattr(module, "encode", lambda *_: pytest.fail("encoded again"))
    assert prepare(settings, "cpu") == folder
    record = json.loads((folder / PREPARED).read_text())
    (folder / PREPARED).write_text(json.dumps(record | {"pictures": "others"}))
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        prepare(settings, "cpu")


@pytest.fixture
def seen(monkeypatch):
    """The ranges of pictures that are encoded, in order; the disk has each step at once."""
    found, made = [], module.encoded
    monkeypatch.setattr(module, "encoded", lambda *a: found.append(a[2]) or made(*a))
    monkeypatch.setattr(module, "SYNC_SECONDS", 0)
    return found


def stopped(settings, monkeypatch, after):
    """Prepare, and stop like Ctrl-C in the write of step number `after`."""
    write = EncodedWriter.write

    def dying(self, rows, digests, parts):
        if rows.start == 4 * after:
            raise KeyboardInterrupt
        write(self, rows, digests, parts)

    with monkeypatch.context() as patch:
        patch.setattr(EncodedWriter, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, "cpu")


def named_files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if PART not in p.name}


def bytes_of(folder):
    return [(Path(folder) / name).read_bytes() for name in (LATENTS, TEXT)]


def test_a_stopped_run_leaves_no_array_and_goes_on_to_the_same_bytes(
    settings, tmp_path, monkeypatch, seen
):
    whole = prepare(settings.but(data_dir=str(tmp_path / "whole")), "cpu")
    seen.clear()
    stopped(settings, monkeypatch, 2)
    assert not named_files(tmp_path / "encoded")
    prepare(settings, "cpu")
    assert seen == [range(0, 4), range(4, 8), range(8, 11), range(8, 11)]
    assert bytes_of(settings.data_dir) == bytes_of(whole)
    assert sorted(p.name for p in whole.iterdir()) == sorted(named_files(tmp_path / "encoded"))
    assert not [p for p in (tmp_path / "encoded").iterdir() if PART in p.name]


def test_what_the_disk_may_not_have_is_encoded_again(settings, monkeypatch, seen):
    monkeypatch.setattr(module, "SYNC_SECONDS", 1e9)
    stopped(settings, monkeypatch, 2)
    prepare(settings, "cpu")
    assert seen[3:] == [range(0, 4), range(4, 8), range(8, 11)]


def test_files_shorter_than_their_record_are_encoded_again(settings, tmp_path, monkeypatch, seen):
    stopped(settings, monkeypatch, 2)
    os.truncate(tmp_path / f"encoded/.mirrored{PART}", 5)
    prepare(settings, "cpu")
    assert seen[3:] == [range(0, 4), range(4, 8), range(8, 11)]


def test_another_process_is_told_that_one_is_at_work(settings, tmp_path, monkeypatch):
    def another(*_):
        with pytest.raises(UserError, match="by another process.*run the same again"):
            EncodedWriter(tmp_path / "encoded", {}, ((1,), (1,))).__enter__()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode", another)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, "cpu")


def test_numbers_beyond_float16_and_a_small_disk_are_refused(settings, tmp_path, monkeypatch):
    bad = torch.tensor([[1.0, 1e6]])
    with (
        EncodedWriter(tmp_path, {}, ((2,), (2,))) as parts,
        pytest.raises(UserError, match="DTYPE=fp32"),
    ):
        parts.open()
        parts.write(range(1), ["x"], (bad, bad, bad))
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="MB are needed.*DATA_DIR"):
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


@pytest.mark.parametrize("change,back", [(another_picture, False), (another_caption, True)])
def test_what_was_changed_while_a_run_was_stopped_is_encoded_again(
    settings, tmp_path, tiny_data, monkeypatch, seen, change, back
):
    source = tmp_path / "own"
    shutil.copytree(tiny_data, source)
    shutil.copytree(tiny_data, tmp_path / "kept")
    settings = settings.but(source_dir=str(source))
    stopped(settings, monkeypatch, 2)
    change(source)
    if back:  # changed again after a second stop: rows of the first run may be overwritten by then
        stopped(settings, monkeypatch, 2)
        shutil.copytree(tmp_path / "kept", source, dirs_exist_ok=True)
    prepare(settings, "cpu")
    whole = prepare(settings.but(data_dir=str(tmp_path / "whole")), "cpu")
    assert bytes_of(settings.data_dir) == bytes_of(whole)


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
    last = json.loads(lines_of(source)[-1])
    added = last | {"file_name": "new.png", "text": "the tree in the style of soft"}
    shutil.copy(source / last["file_name"], source / "new.png")
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
