"""Properties of an array that is kept on disk with what it was made from."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from concept_trak import atomic_io
from concept_trak.atomic_io import sha256_file
from concept_trak.errors import UserError
from concept_trak.store.array_cache import cached, read_npz, write_cached, write_npz

ARRAY = np.arange(12, dtype=np.float64).reshape(3, 4).T / 7


def never():
    raise AssertionError("computed again")


def test_the_same_identity_is_read_and_another_computed_again(tmp_path):
    path = tmp_path / "deep/query.npy"
    first = cached(path, {"model": "a", "steps": (1, 2)}, lambda: ARRAY)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, ARRAY.astype(np.float32))
    again = cached(path, {"model": "a", "steps": (1, 2)}, never)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), first)
    other = cached(path, {"model": "b", "steps": (1, 2)}, lambda: ARRAY + 1)
    np.testing.assert_array_equal(other, cached(path, {"model": "b", "steps": [1, 2]}, never))
    forced = cached(path, {"model": "b", "steps": (1, 2)}, lambda: ARRAY, force=True)
    np.testing.assert_array_equal(forced, first)
    assert sorted(p.name for p in path.parent.iterdir()) == ["query.json", "query.npy"]


def test_a_changed_file_is_computed_again(tmp_path):
    path = tmp_path / "query.npy"
    first = cached(path, {}, lambda: ARRAY)
    np.save(path, first + 1)
    np.testing.assert_array_equal(cached(path, {}, lambda: ARRAY), first)


def test_the_record_is_never_beside_another_array(tmp_path, monkeypatch):
    """Gone before the array gets its name, and back only after."""
    path, seen = tmp_path / "query.npy", []
    cached(path, {"model": "a"}, lambda: ARRAY)
    replace = os.replace

    def watched(source, target):
        seen.append((Path(target).name, path.with_suffix(".json").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    cached(path, {"model": "b"}, lambda: ARRAY + 1)
    assert seen == [("query.npy", False), ("query.json", False)]
    assert json.loads(path.with_suffix(".json").read_text())["identity"] == {"model": "b"}


def test_a_bad_value_leaves_what_was_there(tmp_path):
    path = tmp_path / "query.npy"
    first = cached(path, {"model": "a"}, lambda: ARRAY)
    with pytest.raises(UserError, match="the gradient for query.npy is NaN or infinite"):
        cached(path, {"model": "b"}, lambda: ARRAY * np.nan)
    np.testing.assert_array_equal(cached(path, {"model": "a"}, never), first)


def test_a_full_disk_is_one_clear_line_and_leaves_no_file(tmp_path, full_disk):
    with pytest.raises(UserError, match="cannot write .*query.npy: the disk is full") as error:
        cached(tmp_path / "query.npy", {}, lambda: ARRAY)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("record", ["[1]", "3", "", '{"identity": NaN}', "\0", '{"identity": {}}'])
def test_whatever_the_record_says_the_array_is_made_once(tmp_path, record):
    path, made = tmp_path / "query.npy", []
    cached(path, {}, lambda: made.append(1) or ARRAY)
    path.with_suffix(".json").write_text(record)
    np.testing.assert_array_equal(
        cached(path, {}, lambda: made.append(1) or ARRAY), ARRAY.astype(np.float32)
    )
    assert len(made) == 2


def test_arrays_are_kept_together_and_a_damaged_file_is_none(tmp_path):
    path = tmp_path / "new/a.npz"
    assert read_npz(path) is None
    write_npz(path, {"x": np.arange(3), "share": 0.5, "names": np.array(["a", "bc"])})
    kept = read_npz(path)
    assert kept["x"].tolist() == [0, 1, 2] and float(kept["share"]) == 0.5
    assert kept["names"].tolist() == ["a", "bc"]
    whole = path.read_bytes()
    flipped = bytes(b ^ 255 if i == 60 else b for i, b in enumerate(whole))
    for damaged in (flipped, whole[:40], whole[: len(whole) // 2], b"", b"not a zip"):
        path.write_bytes(damaged)
        assert read_npz(path) is None


KEPT = {
    "shape": np.ones((2, 3), "<f4"),
    "axes": np.ones((1, 3, 4), "<f4"),
    "type": np.ones((3, 4), "<f8"),
    "integers": np.ones((3, 4), "<i4"),
    "nan": np.full((3, 4), np.nan, "<f4"),
    "inf": np.full((3, 4), np.inf, "<f4"),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_an_array_of_another_form_is_made_again_also_where_its_record_fits(tmp_path, kept):
    path, right = tmp_path / "query.npy", np.zeros((3, 4), np.float32)
    write_cached(path, {"model": "a"}, kept)
    found = cached(path, {"model": "a"}, lambda: right, shape=(3, 4))
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("spoil", [
    lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    lambda whole: whole[:-4] + whole[:4],
    lambda whole: whole[: len(whole) // 2],
    lambda whole: whole + b"\0",
])  # fmt: skip
def test_a_file_is_read_again_when_it_changed_and_only_then(tmp_path, monkeypatch, spoil):
    path, reads = tmp_path / "a", []
    path.write_bytes(bytes(range(256)) * 8)
    monkeypatch.setattr(atomic_io, "SETTLED", 0.0)  # else a new file is read each time
    monkeypatch.setattr(atomic_io, "sha256_file", lambda p: reads.append(p) or sha256_file(p))
    first = atomic_io.sha256_once(path)
    assert atomic_io.sha256_once(path) == first == sha256_file(path) and len(reads) == 1
    time.sleep(0.02)  # a tick of the clock of files
    path.write_bytes(spoil(path.read_bytes()))
    assert atomic_io.sha256_once(path) != first and len(reads) == 2
    os.utime(path, ns=(0, 0))
    assert atomic_io.sha256_once(path) != first and len(reads) == 3


def test_a_file_that_may_yet_change_unseen_is_always_read(tmp_path):
    path = tmp_path / "a"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert atomic_io.sha256_once(path) == sha256_file(path)
