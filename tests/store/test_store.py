"""Properties of the gradient store: crash safety, refusals, formats."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from concept_trak.errors import UserError
from concept_trak.store import writer as shard_writer
from concept_trak.store.shards import Store

N, K, SPLITS = 23, 8, 4
IDENTITY = {
    "settings": {"states": 9, "layer": "attn2"},
    "model_hash": "abc",
    "projection": {"kind": "sjlt", "seed": 0},
}
REPOSITORY = Path(__file__).parents[2]


def make(
    folder, dtype="float32", layout="npy", num_rows=N, num_split=SPLITS, identity=IDENTITY, dim=K
):
    return Store.create(folder, num_rows, dim, num_split, dtype, identity, layout, provenance={})


def some_rows(num_rows=N, dim=K):
    return np.random.default_rng(0).standard_normal((num_rows, dim)).astype(np.float32)


def fill(store, rows, batch=2, shards=None):
    for shard in store.pending(shards):
        stop = store.shard_range(shard)[1]
        for first in range(store.resume_row(shard), stop, batch):
            store.append(shard, rows[first : min(first + batch, stop)], first)
        store.finish(shard)
    return store


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read(store, max_rows=3):
    return np.concatenate([block for _, block in store.blocks(max_rows)])


@pytest.mark.parametrize("layout", ["npy", "raw"])
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_rows_come_back_to_within_the_stored_precision(tmp_path, dtype, tolerance, layout):
    rows = some_rows()
    fill(make(tmp_path, dtype, layout), rows)
    store = Store.open(tmp_path, IDENTITY)
    np.testing.assert_allclose(read(store), rows, rtol=tolerance, atol=1e-7 if tolerance else 0)
    picked = [22, 0, 7, 7, 5]
    np.testing.assert_array_equal(store.rows(picked), read(store)[picked])
    assert [first for first, _ in store.blocks(4)] == [0, 4, 5, 9, 11, 15, 17, 21]


def test_bfloat16_rounds_to_nearest_even_as_torch_does():
    torch = pytest.importorskip("torch")
    values = np.concatenate(
        [some_rows().ravel(), np.float32([1.00390625, 1.01171875, 0, -0.0, 1e-40, 65504, 3e38])]
    )
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(
        shard_writer.decode(shard_writer.encode(values, "bfloat16"), "bfloat16"), expected
    )


def test_npy_shards_are_real_npy_and_raw_shards_are_bare_float32(tmp_path):
    rows = some_rows()
    fill(make(tmp_path / "npy", "float16"), rows)
    assert np.load(tmp_path / "npy/train_grad-1.npy", allow_pickle=False).shape == (6, K)
    fill(make(tmp_path / "raw", layout="raw"), rows)
    bare = np.memmap(tmp_path / "raw/train_grad-1.npy", np.float32, "r", shape=(6, K))
    np.testing.assert_array_equal(bare, rows[5:11])


@pytest.mark.parametrize(
    "num_rows, num_split", [(1, 1), (7, 7), (10, 3), (23, 4), (100, 16), (5, 2)]
)
def test_shards_cover_n_for_any_count(tmp_path, num_rows, num_split):
    store = make(tmp_path, num_rows=num_rows, num_split=num_split)
    covered = [row for shard in range(num_split) for row in range(*store.shard_range(shard))]
    assert covered == list(range(num_rows))
    sizes = [stop - start for start, stop in map(store.shard_range, range(num_split))]
    assert max(sizes) - min(sizes) <= 1
    rows = some_rows(num_rows)
    np.testing.assert_array_equal(read(fill(store, rows)), rows)


WRITER = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from concept_trak.store import writer as shard_writer
from concept_trak.store.shards import Store
shard_writer.SYNC_SECONDS = 0.0
rows = np.random.default_rng(0).standard_normal((240, 8)).astype(np.float32)
store = Store.create({folder!r}, 240, 8, 3, "float16", {identity!r}, provenance={{}})
print("ready", flush=True)
for shard in store.pending():
    stop = store.shard_range(shard)[1]
    for first in range(store.resume_row(shard), stop, 5):
        store.append(shard, rows[first : min(first + 5, stop)], first)
    store.finish(shard)
"""


def test_killed_run_resumes_to_same_bytes(tmp_path):
    """SIGKILL at 20 random moments; whatever is left, running again ends with the very files of an
    uninterrupted run.
    """
    fill(make(tmp_path / "whole", "float16", num_rows=240, num_split=3), some_rows(240), batch=5)
    code = WRITER.format(root=str(REPOSITORY), folder=str(tmp_path / "killed"), identity=IDENTITY)
    rng, killed, reached = random.Random(0), 0, set()
    for _ in range(60):  # on a busy machine some rounds end before their kill; twenty must not
        if killed == 20:
            break
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        store = make(tmp_path / "killed", "float16", num_rows=240, num_split=3)
        reached.add(
            sum(store.resume_row(shard) - store.shard_range(shard)[0] for shard in range(3))
        )
        if (
            not store.pending()
        ):  # finished before the kill: begin again, so that every round kills a writer
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
    assert killed == 20 and len(reached) > 2
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("calls_before_crash", range(12))
def test_crash_between_any_two_disk_operations_resumes_to_same_bytes(
    tmp_path, monkeypatch, calls_before_crash
):
    fill(make(tmp_path / "whole", num_rows=9, num_split=2), some_rows(9))
    monkeypatch.setattr(shard_writer, "SYNC_SECONDS", 0.0)
    store, left = make(tmp_path / "cut", num_rows=9, num_split=2), [3 * calls_before_crash]

    def counted(call):
        def wrapper(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return call(*args)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            fill(store, some_rows(9))
    fill(make(tmp_path / "cut", num_rows=9, num_split=2), some_rows(9))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_torn_rows_after_the_last_count_are_cut_off(tmp_path):
    store, rows = make(tmp_path), some_rows()
    store.append(1, rows[5:8], 5)
    store._writers[1].sync()
    store._writers.pop(1).close()
    with open(tmp_path / "train_grad-1.npy.part", "ab") as file:
        file.write(b"torn" * 13)
    again = make(tmp_path)
    assert again.resume_row(1) == 8
    np.testing.assert_array_equal(read(fill(again, rows)), rows)


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


def test_finished_shards_are_never_overwritten(tmp_path):
    store = fill(make(tmp_path), some_rows())
    before = contents(tmp_path)
    with pytest.raises(UserError, match="never overwritten"):
        store.append(0, some_rows()[:1], 0)
    store.finish(0)
    assert fill(make(tmp_path), -some_rows()).pending() == [] and contents(tmp_path) == before


@pytest.mark.parametrize("change, name", [
    ({"identity": {**IDENTITY, "model_hash": "xyz"}}, "identity.model_hash = 'abc', not 'xyz'"),
    ({"identity": {**IDENTITY, "settings": {"states": 5, "layer": "attn2"}}}, "identity.settings.states = 9, not 5"),
    ({"dim": 16}, "dim = 8, not 16"),
    ({"num_rows": 24}, "num_rows = 23, not 24"),
    ({"num_split": 5}, "bounds"),
    ({"dtype": "float16"}, "dtype = 'float32', not 'float16'"),
])  # fmt: skip
def test_store_refuses_other_settings(tmp_path, change, name):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        make(tmp_path, **change)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_open_refuses_what_was_not_expected(tmp_path):
    fill(make(tmp_path), some_rows())
    Store.open(
        tmp_path, {"model_hash": "abc", "dim": K, "settings": {"states": 9, "layer": "attn2"}}
    )
    with pytest.raises(UserError, match="model_hash = 'abc', not 'new'"):
        Store.open(tmp_path, {"model_hash": "new"})
    with pytest.raises(UserError, match="dim = 8, not 4"):
        Store.open(tmp_path, {"dim": 4})
    with pytest.raises(UserError, match="no gradient store"):
        Store.open(tmp_path / "absent")


def damage_truncate(folder):
    os.truncate(folder / "train_grad-2.npy", 200)


def damage_nan(folder):
    shard = np.load(folder / "train_grad-2.npy")
    shard[3, 2] = np.nan  # sample 14
    np.save(folder / "train_grad-2.npy", shard)


def damage_value(folder):
    shard = np.load(folder / "train_grad-2.npy")
    shard[3, 2] += 1
    np.save(folder / "train_grad-2.npy", shard)


def damage_wrong_k(folder):
    np.save(folder / "train_grad-2.npy", np.zeros((6, K - 2), np.float32))


def damage_foreign(folder):
    other = {**IDENTITY, "model_hash": "other"}
    fill(make(folder / "other", identity=other), some_rows())
    for name in ("train_grad-2.npy", "train_grad-2.json"):
        os.replace(folder / "other" / name, folder / name)


def damage_unfinished(folder):
    (folder / "train_grad-2.npy").unlink()


@pytest.mark.parametrize("damage, message", [
    (damage_truncate, "train_grad-2.npy is truncated"),
    (damage_nan, "sample 14 is NaN"),
    (damage_value, "checksum differs"),
    (damage_wrong_k, "does not hold 6 rows of 8"),
    (damage_foreign, "train_grad-2.json belongs to another store"),
    (damage_unfinished, "shard 2 of 4 is not finished"),
])  # fmt: skip
def test_open_refuses_damaged_shards_in_one_line(tmp_path, damage, message):
    fill(make(tmp_path), some_rows())
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        Store.open(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nan_names_the_sample_and_the_run_can_go_on(tmp_path):
    store, rows = make(tmp_path), some_rows()
    bad = rows.copy()
    bad[8, 3] = np.nan
    with pytest.raises(UserError, match="gradient of sample 8 is NaN"):
        fill(store, bad)
    np.testing.assert_array_equal(read(fill(store, rows)), rows)


def test_overflow_of_float16_names_the_sample_but_bfloat16_holds_it(tmp_path):
    rows = some_rows()
    rows[2] *= 1e6
    with pytest.raises(UserError, match="sample 2 is too large for float16"):
        fill(make(tmp_path / "fp16", "float16"), rows)
    np.testing.assert_allclose(
        read(fill(make(tmp_path / "bf16", "bfloat16"), rows)), rows, rtol=2**-8
    )


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


def test_rows_must_come_in_order_and_complete(tmp_path):
    store, rows = make(tmp_path), some_rows()
    with pytest.raises(ValueError, match="continues at row 0"):
        store.append(0, rows[1:2], 1)
    with pytest.raises(ValueError, match="continues at row 0"):
        store.append(0, rows[:9], 0)
    store.append(0, rows[:2], 0)
    with pytest.raises(ValueError, match="rows up to 2 of 5"):
        store.finish(0)
    with pytest.raises(UserError, match=r"rows of 8 values, not arrays of shape \[1, 3\]"):
        store.append(0, rows[:1, :3], 0)


def test_released_raw_shards_can_be_adopted(tmp_path):
    rows = some_rows()
    rows[:12].tofile(tmp_path / "train_grad-0.npy")
    rows[12:].tofile(tmp_path / "train_grad-1.npy")
    Store.adopt_raw(tmp_path, K)
    store = Store.open(tmp_path)
    np.testing.assert_array_equal(read(store, 5), rows)
    assert store.shard_range(1) == (12, N)


def test_adoption_records_the_identity_it_is_given(tmp_path):
    some_rows().tofile(tmp_path / "train_grad-0.npy")
    np.testing.assert_array_equal(Store.raw_shards(tmp_path, K).rows([3, 0]), some_rows()[[3, 0]])
    assert not (tmp_path / "manifest.json").exists()
    Store.adopt_raw(tmp_path, K, IDENTITY, {"origin": "a download"})
    store = Store.open(tmp_path, IDENTITY)
    assert store.identity == {"adopted": "raw float32", **IDENTITY} and store.manifest[
        "provenance"
    ] == {"origin": "a download"}
    with pytest.raises(UserError, match="projection.seed = 0, not 1"):
        Store.open(tmp_path, {"projection": {"kind": "sjlt", "seed": 1}})


def test_adoption_refuses_gaps_wrong_width_nan_and_real_npy(tmp_path):
    with pytest.raises(UserError, match="found none"):
        Store.adopt_raw(tmp_path, K)
    some_rows().tofile(tmp_path / "train_grad-0.npy")
    with pytest.raises(UserError, match="not of 7 float32"):
        Store.adopt_raw(tmp_path, 7)
    np.save(tmp_path / "train_grad-1.npy", some_rows())
    with pytest.raises(UserError, match="real .npy"):
        Store.adopt_raw(tmp_path, K)
    bad = some_rows()
    bad[4, 4] = np.inf
    bad.tofile(tmp_path / "train_grad-1.npy")
    with pytest.raises(UserError, match=f"sample {N + 4} is NaN or infinite"):
        Store.adopt_raw(tmp_path, K)
    assert not (tmp_path / "manifest.json").exists()
    os.rename(tmp_path / "train_grad-1.npy", tmp_path / "train_grad-3.npy")
    with pytest.raises(UserError, match="without gaps, found 0, 3"):
        Store.adopt_raw(tmp_path, K)


def test_checksum_follows_content_and_identity(tmp_path):
    rows = some_rows()
    one = fill(make(tmp_path / "a"), rows).checksum
    assert one == fill(make(tmp_path / "b"), rows).checksum
    rows[3, 3] += 1
    assert one != fill(make(tmp_path / "c"), rows).checksum
    assert one != fill(make(tmp_path / "d", identity={"x": 1}), some_rows()).checksum


def test_importing_the_store_does_not_import_torch():
    code = "import sys; import concept_trak.store.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_manifest_keeps_the_first_provenance(tmp_path):
    Store.create(tmp_path, N, K, 1, "float32", IDENTITY, provenance={"git": "one"})
    store = Store.create(tmp_path, N, K, 1, "float32", IDENTITY, provenance={"git": "two"})
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["provenance"]
        == {"git": "one"}
        == store.manifest["provenance"]
    )
