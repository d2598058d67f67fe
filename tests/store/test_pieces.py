"""Pieces of a shard: made in any order, by any process, they end as the shard of one run."""

import errno
import os

import numpy as np
import pytest
from stores import contents, fill, make, some_losses, some_rows

from concept_trak.errors import UserError
from concept_trak.store.chunks import Chunk, gaps, pack, split

ROWS, LOSSES = some_rows(), some_losses()


def put(store, shard, first, stop):
    here, losses = slice(first, stop), LOSSES[first:stop] if store.has_losses else None
    store.put_piece(Chunk(shard, first, stop), ROWS[here], losses)


def put_all(store, step, order):
    pieces = [
        Chunk(shard, *run)
        for shard in range(store.num_split)
        for run in split(*store.shard_range(shard), store.bounds[shard], step)
    ]
    for i in order(len(pieces)):
        put(store, pieces[i].shard, pieces[i].first, pieces[i].stop)


def finish(store):
    for shard in store.pending():
        store.absorb(shard)
        assert store.missing(shard) == []
        store.finish(shard)
    return store


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("losses", [False, True])
def test_pieces_in_any_order_end_in_the_bytes_of_one_run(tmp_path, dtype, losses):
    whole = fill(make(tmp_path / "whole", dtype, losses=losses), ROWS)
    store = make(tmp_path / "pieces", dtype, losses=losses)
    put_all(store, 2, np.random.default_rng(0).permutation)
    assert contents(finish(store).folder) == contents(whole.folder)


def test_rows_of_a_run_that_stopped_and_pieces_add_up(tmp_path):
    """A prefix that was appended, pieces behind a gap, then the gap."""
    whole = fill(make(tmp_path / "whole"), ROWS)
    store = make(tmp_path / "mixed")
    start, stop = store.shard_range(1)
    store.append(1, ROWS[start : start + 2], start)
    writer = store._writers.pop(1)
    writer.sync()
    writer.close()
    put(store, 1, start + 3, stop)
    again = make(tmp_path / "mixed")
    assert again.missing(1) == [(start + 2, start + 3)]
    again.absorb(1)
    again.append(1, ROWS[start + 2 : start + 3], start + 2)
    again.absorb(1)
    again.finish(1)
    shard = {name: data for name, data in contents(whole.folder).items() if "-1." in name}
    assert {n: d for n, d in contents(again.folder).items() if "-1." in n} == shard


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda data: data[:-3], "truncated or damaged"),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "checksum differs"),
        (lambda data: b"", "truncated or damaged"),
    ],
)
def test_a_damaged_piece_is_told_and_its_rows_are_missing_again(tmp_path, capsys, spoil, said):
    store = make(tmp_path)
    start, stop = store.shard_range(0)
    put(store, 0, start, stop)
    path = tmp_path / Chunk(0, start, stop).name
    path.write_bytes(spoil(path.read_bytes()))
    assert store.missing(0) == []
    store.absorb(0)
    assert said in capsys.readouterr().out
    assert store.missing(0) == [(start, stop)] and not path.exists()


@pytest.mark.parametrize("dtype", ["<f8", "<f2", "<i4"])
def test_a_piece_of_numbers_of_another_type_is_not_taken(tmp_path, dtype):
    store = make(tmp_path)
    piece = Chunk(0, *store.shard_range(0))
    store.write_piece(piece, pack(store.store_id, ROWS[: piece.stop].astype(dtype), None))
    with pytest.raises(UserError, match="holds numbers of another type; it is removed"):
        store.stored_piece(piece)


def test_a_piece_of_another_store_is_not_taken(tmp_path):
    one, other = make(tmp_path / "one"), make(tmp_path / "other", identity={"model": "other"})
    put(other, 0, *other.shard_range(0))
    piece = Chunk(0, *other.shard_range(0))
    os.rename(other.folder / piece.name, one.folder / piece.name)
    with pytest.raises(UserError, match="belongs to another store"):
        one.stored_piece(piece)


def test_a_nan_is_named_by_its_sample(tmp_path):
    store, rows = make(tmp_path), ROWS[:5].copy()
    rows[3, 2] = np.nan
    with pytest.raises(UserError, match="sample 3 is NaN"):
        store.put_piece(Chunk(0, 0, 5), rows)
    assert store.pieces(0) == []


def test_a_full_disk_leaves_no_piece(tmp_path, monkeypatch):
    store = make(tmp_path)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("concept_trak.atomic_io.os.fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        put(store, 0, 0, 5)
    assert store.pieces(0) == [] and {*contents(tmp_path)} == {"manifest.json"}


def test_gaps_and_cuts_cover_the_rows():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, stop, step = 3, int(rng.integers(4, 60)), int(rng.integers(1, 9))
        cuts = [p for p in split(first, stop, 0, step) if rng.random() < 0.5]
        done = [Chunk(0, *cut) for cut in cuts]
        left = {row for gap in gaps(first, stop, done) for row in range(*gap)}
        assert left == set(range(first, stop)) - {row for cut in cuts for row in range(*cut)}
        assert all(b - a <= step for a, b in split(first, stop, 0, step))
