"""Properties of a store that is being written: killed, crashed, out of disk, by several at once."""

import errno
import os
import random
import signal
import time

import kills
import numpy as np
import pytest
from stores import contents, fill, make, read, some_losses, some_rows

from concept_trak.errors import UserError
from concept_trak.store import writer as shard_writer
from concept_trak.store.store import Store


def write(folder, shape, ready):
    """The rows of a store, in a process of its own; says when it begins, and how long it takes."""
    shard_writer.SYNC_SECONDS = 0.0
    rows, began = some_rows(240), time.monotonic()
    fill(make(folder.with_name(f"tried-{os.getpid()}"), "float16", **shape), rows, batch=5)
    store = make(folder, "float16", **shape)
    ready.send(time.monotonic() - began)
    fill(store, rows, batch=5)


def start_writing(folder, shape):
    """(process that has begun, seconds that it takes)."""
    begun, ready = kills.SERVER.Pipe(duplex=False)
    process = kills.SERVER.Process(target=write, args=(folder, shape, ready))
    process.start()
    assert begun.poll(120)
    return process, begun.recv()


@pytest.mark.parametrize("losses", [False, True])
def test_killed_run_resumes_to_same_bytes(tmp_path, losses):
    """SIGKILL at 20 random moments; whatever is left, running again ends with the very files of an
    uninterrupted run.
    """
    shape = {"num_rows": 240, "num_split": 3, "losses": losses}
    fill(make(tmp_path / "whole", "float16", **shape), some_rows(240), batch=5)
    rng, killed, reached = random.Random(0), 0, set()
    for _ in range(60):  # on a busy machine some rounds end before their kill; twenty must not
        if killed == 20:
            break
        child, seconds = start_writing(tmp_path / "killed", shape)
        time.sleep(rng.uniform(0, 0.7 * seconds))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        store = make(tmp_path / "killed", "float16", **shape)
        reached.add(sum(store.resume_row(i) - store.shard_range(i)[0] for i in range(3)))
        if not store.pending():  # finished before the kill: begin again, to kill a writer each time
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
    assert killed == 20 and len(reached) > 2
    last, _ = start_writing(tmp_path / "killed", shape)
    last.join()
    assert last.exitcode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("losses", [False, True])
def test_crash_before_any_disk_operation_resumes_to_same_bytes(tmp_path, monkeypatch, losses):
    """Each write, fsync and rename in turn is the first that does not happen; counted rows stay."""
    shape, rows, before = {"num_rows": 9, "num_split": 2, "losses": losses}, some_rows(9), 0
    whole = contents(fill(make(tmp_path / "whole", **shape), rows).folder)
    monkeypatch.setattr(shard_writer, "SYNC_SECONDS", 0.0)
    while True:
        store, left = make(tmp_path / f"cut-{before}", **shape), [before]

        def counted(call, left=left):
            def wrapper(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return call(*args)

            return wrapper

        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "replace"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                fill(store, rows)
                break
            except KeyboardInterrupt:
                pass
        again = make(store.folder, **shape)
        for shard in range(2):
            counted_rows = store.record(shard).get("rows", 0)
            assert again.resume_row(shard) - again.shard_range(shard)[0] == counted_rows
        assert contents(fill(again, rows).folder) == whole
        before += 1
    assert before > 30 and contents(store.folder) == whole


def test_rows_are_counted_only_once_they_are_synced_in_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SYNC_SECONDS", 0.0)
    store, synced, counts = make(tmp_path, losses=True), {}, []
    fsync, write_record = os.fsync, Store.write_record

    def syncing(fd):
        fsync(fd)
        synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    def recording(self, shard, rows, *digests):
        for series in self.series:
            inode = self.path(shard, ".npy.part", series.name).stat().st_ino
            needed = len(series.header(self.count(shard))) + rows * series.item_bytes
            assert synced.get(inode, 0) >= needed
        counts.append(rows)
        write_record(self, shard, rows, *digests)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Store, "write_record", recording)
    fill(store, some_rows())
    assert counts[:4] == [2, 4, 5, 5]


@pytest.mark.parametrize("name", ["train_grad", "train_loss"])
def test_torn_rows_after_the_last_count_are_cut_off(tmp_path, name):
    store, rows = make(tmp_path, losses=True), some_rows()
    store.append(1, rows[5:8], 5, some_losses()[5:8])
    store._writers[1].sync()
    store._writers.pop(1).close()
    with open(tmp_path / f"{name}-1.npy.part", "ab") as file:
        file.write(b"torn" * 13)
    again = make(tmp_path, losses=True)
    assert again.resume_row(1) == 8
    np.testing.assert_array_equal(read(fill(again, rows)), rows)
    np.testing.assert_array_equal(Store.open(tmp_path).losses(), some_losses())


@pytest.mark.parametrize("name", ["train_grad", "train_loss"])
def test_rows_count_only_as_far_as_both_files_reach(tmp_path, name):
    store, rows = make(tmp_path, losses=True), some_rows()
    store.append(1, rows[5:8], 5, some_losses()[5:8])
    store._writers[1].sync()
    store._writers.pop(1).close()
    part = tmp_path / f"{name}-1.npy.part"
    os.truncate(part, part.stat().st_size - 1)
    assert make(tmp_path, losses=True).resume_row(1) == 7
    part.unlink()
    again = make(tmp_path, losses=True)
    assert again.resume_row(1) == 5
    np.testing.assert_array_equal(fill(again, rows).losses(), some_losses())


def test_processes_fill_different_shards_at_once_but_not_the_same(tmp_path):
    rows = some_rows()
    first, second = make(tmp_path), make(tmp_path)
    first.append(0, rows[0:1], 0)
    with pytest.raises(UserError, match="written by another process"):
        second.append(0, rows[0:1], 0)
    fill(second, rows, shards=[2, 3])
    assert first.pending() == [0, 1] and make(tmp_path).pending([1, 2]) == [1]
    first.append(0, rows[1:5], 1)
    first.finish(0)
    fill(first, rows)
    np.testing.assert_array_equal(read(Store.open(tmp_path)), rows)


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_full_disk_is_one_clear_line_and_keeps_finished_shards(tmp_path, monkeypatch, operation):
    rows, store = some_rows(), make(tmp_path)
    fill(store, rows, shards=[0])
    finished = contents(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(UserError, match="the disk is full") as error:
            fill(store, rows)
    assert "\n" not in str(error.value)
    now = contents(tmp_path)
    assert "train_grad-1.npy" not in now and all(
        now[name] == data for name, data in finished.items()
    )
    np.testing.assert_array_equal(read(fill(store, rows)), rows)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_device_is_one_clear_line(tmp_path):
    store = make(tmp_path)
    (tmp_path / "train_grad-0.npy.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*train_grad-0.npy.part"):
        fill(store, some_rows())
    assert not (tmp_path / "train_grad-0.npy").exists()
