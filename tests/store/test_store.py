"""Properties of the gradient store: formats, refusals, adoption."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from stores import IDENTITY, REPOSITORY, K, N, contents, fill, make, read, some_rows

from concept_trak.errors import UserError
from concept_trak.store.dtypes import decode, encode
from concept_trak.store.store import Layout, Store


@pytest.mark.parametrize("kind", ["npy", "raw"])
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_rows_come_back_to_within_the_stored_precision(tmp_path, dtype, tolerance, kind):
    rows = some_rows()
    fill(make(tmp_path, dtype, kind=kind), rows)
    store = Store.open(tmp_path, IDENTITY)
    np.testing.assert_allclose(read(store), rows, rtol=tolerance, atol=1e-7 if tolerance else 0)
    picked = [22, 0, 7, 7, 5]
    np.testing.assert_array_equal(store.rows(picked), read(store)[picked])
    assert [first for first, _ in store.stored_blocks(4)] == [0, 4, 5, 9, 11, 15, 17, 21]
    widened = np.concatenate([block.numpy() for _, block in store.tensor_blocks(3)])
    np.testing.assert_array_equal(widened, read(store))


@pytest.mark.parametrize("dtype, kind, digest", [
    ("float32", "npy", "254d66040e5e1ac2"),
    ("float32", "raw", "ae73ca64490f6cca"),
    ("float16", "npy", "7cf2a2424e21e5f8"),
    ("bfloat16", "npy", "b8014318a7f207c1"),
])  # fmt: skip
def test_a_store_without_losses_is_byte_for_byte_that_of_version_one(tmp_path, dtype, kind, digest):
    identity = {"settings": {"states": 9}, "model_hash": "abc"}
    fill(make(tmp_path, dtype, identity, kind=kind), some_rows(), batch=6)
    found = hashlib.sha256()
    for name, content in sorted(contents(tmp_path).items()):
        found.update(name.encode() + content)
    assert found.hexdigest()[:16] == digest


def test_the_committed_store_opens():
    (folder,) = (REPOSITORY / "data/emoji/grads").iterdir()
    store = Store.open(folder, {"dim": 4032, "losses": True})
    assert store.num_rows == 896 and np.isfinite(store.rows([0, 895])).all()


def test_bfloat16_rounds_to_nearest_even_as_torch_does():
    torch = pytest.importorskip("torch")
    values = np.concatenate(
        [some_rows().ravel(), np.float32([1.00390625, 1.01171875, 0, -0.0, 1e-40, 65504, 3e38])]
    )
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(decode(encode(values, "bfloat16"), "bfloat16"), expected)


def test_npy_shards_are_real_npy_and_raw_shards_are_bare_float32(tmp_path):
    rows = some_rows()
    fill(make(tmp_path / "npy", "float16"), rows)
    assert np.load(tmp_path / "npy/train_grad-1.npy", allow_pickle=False).shape == (6, K)
    fill(make(tmp_path / "raw", kind="raw"), rows)
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


def test_finished_shards_are_never_overwritten(tmp_path):
    store = fill(make(tmp_path), some_rows())
    before = contents(tmp_path)
    with pytest.raises(UserError, match="never overwritten"):
        store.append(0, some_rows()[:1], 0)
    store.finish(0)
    assert fill(make(tmp_path), -some_rows()).pending() == [] and contents(tmp_path) == before


@pytest.mark.parametrize("change, name", [
    ({"identity": {**IDENTITY, "model_hash": "xyz"}}, "identity.model_hash = 'abc', not 'xyz'"),
    ({"identity": {**IDENTITY, "projection": {"kind": "sjlt", "seed": 1}}}, "seed = 0, not 1"),
    ({"dim": 16}, "dim = 8, not 16"),
    ({"num_rows": 24}, "num_rows = 23, not 24"),
    ({"num_split": 5}, "bounds"),
    ({"dtype": "float16"}, "dtype = 'float32', not 'float16'"),
    ({"kind": "raw"}, "layout = 'npy', not 'raw'"),
    ({"losses": True}, "losses = False, not True"),
])  # fmt: skip
def test_store_refuses_other_settings(tmp_path, change, name):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        make(tmp_path, **change)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout, message", [
    ((N, K, 1, "float64"), "unknown store dtype 'float64'; set STORE_DTYPE to one of float16"),
    ((N, K, 1, "float32", "hdf5"), "unknown store layout 'hdf5'"),
    ((N, K, 0, "float32"), "0 shards .* between 1 and the number of rows, 23"),
    ((N, K, 24, "float32"), "24 shards"),
])  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(layout, message):
    with pytest.raises(UserError, match=message):
        Layout(*layout)


def test_a_damaged_manifest_is_one_line(tmp_path):
    whole = Layout(N, K, 2, "float32").manifest() | {"identity": {}, "provenance": {}}
    wrong = {"num_rows": -3, "dim": 2.5, "dtype": [], "layout": "x", "identity": 1, "losses": "no"}
    wrong_bounds = ([], [0], [0, "a"], [0, 0, N], [0, N + 1], [0, N, 5], {})
    manifests = [whole | {key: value} for key, value in wrong.items()]
    manifests += [whole | {"bounds": bounds} for bounds in wrong_bounds]
    for text in ("{", "[]", '{"format": 1}', *map(json.dumps, manifests)):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(
            UserError, match="remove it and make the train gradients again.*: rm "
        ) as error:
            Store.open(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path / "manifest.json") in str(error.value)
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="format = 2, not 1"):
        Store.open(tmp_path)


def test_open_refuses_what_was_not_expected(tmp_path):
    fill(make(tmp_path), some_rows())
    Store.open(
        tmp_path, {"model_hash": "abc", "dim": K, "settings": {"states": 9, "layer": "attn2"}}
    )
    with pytest.raises(UserError, match="model_hash = 'abc', not 'new'"):
        Store.open(tmp_path, {"model_hash": "new"})
    with pytest.raises(UserError, match="dim = 8, not 4"):
        Store.open(tmp_path, {"dim": 4})
    with pytest.raises(UserError, match="losses = False, not True"):
        Store.open(tmp_path, {"losses": True})
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


def test_rows_must_come_in_order_and_complete(tmp_path):
    store, rows = make(tmp_path), some_rows()
    with pytest.raises(ValueError, match="continues at row 0"):
        store.append(0, rows[1:2], 1)
    with pytest.raises(ValueError, match="continues at row 0"):
        store.append(0, rows[:9], 0)
    store.append(0, rows[:2], 0)
    with pytest.raises(ValueError, match="rows up to 2 of 5"):
        store.finish(0)
    with pytest.raises(UserError, match=r"rows of shape \[1, 3\] do not fit .* give rows \[b, 8\]"):
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
    code = "import sys; from concept_trak.store import store, writer, export; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_manifest_keeps_the_first_provenance(tmp_path):
    layout = Layout(N, K, 1, "float32")
    Store.create(tmp_path, layout, IDENTITY, provenance={"git": "one"})
    store = Store.create(tmp_path, layout, IDENTITY, provenance={"git": "two"})
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["provenance"]
        == {"git": "one"}
        == store.manifest["provenance"]
    )


@pytest.mark.parametrize("name", ["train_grad", "train_loss"])
@pytest.mark.parametrize("at", [-1, -9, 130])
def test_what_is_read_whole_is_what_was_finished(tmp_path, name, at):
    """Also where the store was opened by its files' lengths alone."""
    rows = some_rows()
    store = fill(make(tmp_path, "float16", losses=True), rows)
    path = store.path(1, ".npy", name)
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)
    store = Store.open(tmp_path, verify=False)
    with pytest.raises(UserError, match=f"{name}-1.npy is not the file this store finished"):
        store.losses() if name == "train_loss" else [*store.stored_blocks(3)]


def test_files_of_one_shape_exchanged_between_stores_are_told(tmp_path):
    stores = [fill(make(tmp_path / n, identity={"model": n}), some_rows()) for n in "ab"]
    for ending, said in ((".npy", "checksum differs|finished"), (".json", "another store")):
        theirs = stores[1].path(2, ending).read_bytes()
        theirs = theirs[:-1] + b"\1" if ending == ".npy" else theirs
        ours = stores[0].path(2, ending).read_bytes()
        stores[0].path(2, ending).write_bytes(theirs)
        with pytest.raises(UserError, match=said):
            Store.open(tmp_path / "a")
        stores[0].path(2, ending).write_bytes(ours)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "empty", "nothing"])
def test_a_shard_that_is_no_file_of_rows_is_one_line(tmp_path, kind):
    path = fill(make(tmp_path), some_rows()).path(2, ".npy")
    path.unlink()
    act = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "empty": path.touch}
    act |= {"loop": lambda: path.symlink_to(path.name)}
    act.get(kind, lambda: None)()
    with pytest.raises(UserError, match="train_grad-2.npy|shard 2 of 4 is not finished") as told:
        Store.open(tmp_path)
    assert "\n" not in str(told.value)


def test_rows_are_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").write_text("the only copy")
    store = make(tmp_path / "store")
    store.path(0, ".npy.part").symlink_to("../elsewhere")
    with pytest.raises(UserError, match="cannot write .*train_grad-0.npy.part"):
        store.append(0, some_rows()[:1], 0)
    assert (tmp_path / "elsewhere").read_text() == "the only copy"
