"""Codes are made shard by shard, go on after a kill, and are refused where they do not belong."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from indexed_rows import WIDTHS, make_store, solved_queries
from safetensors.torch import load_file, save_file

from concept_trak.errors import UserError
from concept_trak.index.rabitq import Index
from concept_trak.index.search import Search
from concept_trak.index.whitening import Whitening
from concept_trak.scoring.ranking import ranking
from concept_trak.scoring.scores import scores

pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'concept-trak[index]'")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("store"))
    Index.create(store, WIDTHS, 1.0).update()
    return store


@pytest.fixture
def store(built, tmp_path):
    """A copy of a store with its index, to spoil."""
    shutil.copytree(built.folder, tmp_path / "store")
    return type(built).open(tmp_path / "store")


def test_candidates_hold_both_ends_of_the_scan(built):
    index, solved = Index.open(built), solved_queries(built)
    exact, shares = scores(built, solved), []
    for q in range(solved.shape[1]):
        found = Search(300).find(index, solved[:, q])
        assert len(found.rows) < 0.45 * built.num_rows  # both ends of both dampings
        np.testing.assert_allclose(found.scores, exact[:, q, found.rows], rtol=1e-5, atol=1e-7)
        for d in range(len(solved)):
            for largest in (True, False):
                shares.append(np.isin(ranking(exact[d, q], largest, 10), found.rows).mean())
    assert np.mean(shares) > 0.94


def test_a_row_takes_a_sixteenth_of_its_bytes(built):
    index = Index.open(built)
    size = sum(path.stat().st_size for path in index.folder.glob("shard-*.faiss"))
    assert index.row_bytes == 256 / 8 + 8
    assert abs(size / built.num_rows - index.row_bytes) < 2  # the mean row, in each file


def test_estimates_do_not_depend_on_how_small_a_query_is(built):
    index, solved = Index.open(built), solved_queries(built)[0]
    values, rows = index.search(solved, 50)
    small_values, small_rows = index.search(solved * 1e-12, 50)
    assert (rows == small_rows).all()
    np.testing.assert_allclose(small_values, values * 1e-12, rtol=1e-4)


def test_shards_that_come_later_are_added_and_the_others_left_alone(tmp_path):
    store = make_store(tmp_path, shards=[0, 2])
    index = Index.create(store, WIDTHS, 1.0)
    assert index.update() == [0, 2] and index.update() == []
    before = {path: path.stat().st_mtime_ns for path in index.folder.glob("shard-*")}
    store = make_store(tmp_path)
    with pytest.raises(
        UserError,
        match=r"lacks the codes of shard 1, or they were changed; make it: .*build_index.sh",
    ):
        Index.open(store)
    index = Index.create(store, WIDTHS, 1.0)
    assert index.update() == [1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = Search(200).find(Index.open(store), solved_queries(store)[:, 0])
    assert found.rows[-1] >= store.bounds[2]


def test_a_kill_leaves_whole_shards_and_the_next_run_ends_with_the_same_bytes(store, monkeypatch):
    folder = store.folder / "index"
    whole = {path.name: path.read_bytes() for path in folder.glob("*.faiss")}
    for name in ("shard-1.faiss", "shard-2.faiss", "shard-1.json", "shard-2.json"):
        (folder / name).unlink()
    index, blocks = Index.create(store, WIDTHS, 1.0), Index._blocks

    def killed(self, shard):
        if shard == 2:
            raise KeyboardInterrupt
        return blocks(self, shard)

    monkeypatch.setattr(Index, "_blocks", killed)
    with pytest.raises(KeyboardInterrupt):
        index.update()
    monkeypatch.undo()
    assert Index.create(store, WIDTHS, 1.0).update() == [2]
    assert {path.name: path.read_bytes() for path in folder.glob("*.faiss")} == whole


def test_what_does_not_belong_is_refused_with_what_mends_it(store, tmp_path):
    with pytest.raises(UserError, match=r"another damping; remove it, rm -r .*build_index.sh"):
        Index.create(store, WIDTHS, 10.0)
    with pytest.raises(UserError, match="another widths"):
        Index.create(store, (160, 160), 1.0)
    other = make_store(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match=r"has no index; make it: bash scripts/build_index.sh"):
        Index.open(other)
    shutil.copytree(store.folder / "index", other.folder / "index")
    with pytest.raises(UserError, match="belongs to another store"):
        Index.open(other)


def test_damaged_files_are_found_and_made_again(store):
    folder = store.folder / "index"
    codes = folder / "shard-1.faiss"
    codes.write_bytes(codes.read_bytes()[:-10])
    with pytest.raises(UserError, match="lacks the codes of shard 1"):
        Index.open(store)
    assert Index.create(store, WIDTHS, 1.0).update() == [1]
    Index.open(store)
    content = codes.read_bytes()
    codes.write_bytes(content[:-4] + b"abcd")  # of the same length: found by who builds
    assert Index.create(store, WIDTHS, 1.0).update() == [1] and codes.read_bytes() == content
    space = folder / "whitening.safetensors"
    space.write_bytes(space.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match="lost or changed whitening.safetensors"):
        Index.open(store)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json"):
        Index.open(store)


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 8, 12, 48, 60, 700, -300, -1])
@pytest.mark.parametrize("name", ["shard-1.faiss", "shard-1.npy", "shard-1.json"])
def test_codes_with_a_changed_bit_are_refused_and_made_again(store, name, at):
    path = store.folder / "index" / name
    whole = path.read_bytes()
    flipped(path, at % len(whole))
    with pytest.raises(UserError, match="lacks the codes of shard 1, or they were changed"):
        Index.open(store)
    assert Index.create(store, WIDTHS, 1.0).update() == [1] and path.read_bytes() == whole
    Index.open(store)


def test_an_index_of_before_the_sums_of_rows_is_to_be_built_again(store):
    for path in (store.folder / "index").glob("shard-*.npy"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks the codes of shard 0, 1, 2.*build_index.sh"):
        Index.open(store)


@pytest.mark.parametrize(
    "at, said", [(4, "damaged"), (8, "damaged"), (32, "damaged"), (57, "damaged")]
)
def test_faiss_is_given_no_header_that_it_did_not_write(store, at, said):
    """Also where the record says that it is whole: FAISS would read beyond the file."""
    path = store.folder / "index/shard-1.faiss"
    flipped(path, at)
    record = json.loads(path.with_suffix(".json").read_text())
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"has a {said} shard 1; remove it, rm -r .*build_index"):
        Index.open(store).search(solved_queries(store)[0], 10)


def test_codes_of_another_store_of_that_shape_are_refused(store, tmp_path):
    other = make_store(tmp_path / "other", seed=2)
    Index.create(other, WIDTHS, 1.0).update()
    for name in ("shard-1.faiss", "shard-1.json", "shard-1.npy"):
        shutil.copy(other.folder / "index" / name, store.folder / "index" / name)
        with pytest.raises(UserError, match="lacks the codes of shard 1, or they were changed"):
            Index.open(store)


def test_a_row_that_was_changed_is_neither_coded_nor_scored(store):
    solved, rows = solved_queries(store)[:, 0], store.folder / "train_grad-1.npy"
    found = Search(300).find(Index.open(store), solved).rows
    row = int(found[(found >= store.bounds[1]) & (found < store.bounds[2])][0])
    flipped(rows, 128 + (row - store.bounds[1]) * store.grads.item_bytes)
    with pytest.raises(
        UserError, match=f"train_grad-1.npy: row {row} was changed: make that shard"
    ):
        Search(300).find(Index.open(store), solved)
    (store.folder / "index/shard-1.faiss").unlink()
    for spoilt in (
        lambda: Index.create(store, WIDTHS, 1.0).update(),
        lambda: [*store.stored_blocks(9)],
    ):
        with pytest.raises(UserError, match="train_grad-1.npy is not the file.*checksum differs"):
            spoilt()
    shutil.rmtree(store.folder / "index")
    with pytest.raises(UserError, match="checksum differs"):
        Index.create(store, WIDTHS, 1.0)


def other_space(tensors):
    return {
        "a name": tensors | {"stranger": tensors["mean"].clone()},
        "one less": {k: v for k, v in tensors.items() if k != "scale"},
        "a shape": tensors | {"left": tensors["left"][:-1].clone()},
        "a type": tensors | {"mean": tensors["mean"].double()},
        "a range": tensors | {"kept": tensors["kept"] + 200},
        "below 0": tensors | {"kept": tensors["kept"] - 200},
        "nan": tensors | {"scale": tensors["scale"] * float("nan")},
    }


@pytest.mark.parametrize(
    "change",
    other_space(
        {
            "mean": torch.ones(1),
            "scale": torch.ones(1),
            "left": torch.ones(1),
            "kept": torch.ones(1),
        }
    ),
)
def test_a_space_of_another_form_is_refused(store, change):
    path = store.folder / "index/whitening.safetensors"
    save_file(other_space(load_file(path))[change], path)
    with pytest.raises(UserError, match="whitening.safetensors.*make it"):
        Whitening.load(path, WIDTHS, mend="make it")


def test_rows_that_were_made_again_need_new_codes(store):
    record = store.record(1)
    store.write_record(1, record["rows"], {"sha256": "0" * 64})
    assert Index.read_manifest(store).missing() == [1]


def test_a_store_without_a_finished_shard_has_nothing_to_index(tmp_path):
    with pytest.raises(UserError, match="no finished shard"):
        Index.create(make_store(tmp_path, shards=[]), WIDTHS, 1.0)


def test_without_faiss_one_line_says_what_to_install(monkeypatch):
    import sys

    from concept_trak.index.faiss_import import faiss

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'concept-trak\[index\]'"):
        faiss()
