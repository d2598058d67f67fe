"""Properties of the losses that a store may keep beside its rows."""

import json
import os

import numpy as np
import pytest
from stores import SPLITS, K, N, fill, make, some_losses, some_rows

from concept_trak.errors import UserError
from concept_trak.store.store import Layout, Store
from concept_trak.store.verify import pending_shards


@pytest.mark.parametrize("kind", ["npy", "raw"])
def test_losses_come_back_exactly_whatever_the_rows_are_rounded_to(tmp_path, kind):
    fill(make(tmp_path, "bfloat16", kind=kind, losses=True), some_rows())
    losses = Store.open(tmp_path, {"losses": True}).losses()
    assert losses.dtype == np.float32
    np.testing.assert_array_equal(losses, some_losses())


def test_losses_lie_in_a_file_a_shard_with_its_checksum(tmp_path):
    fill(make(tmp_path, losses=True), some_rows())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["manifest.json"]
        + [f"train_grad-{i}{ending}" for i in range(SPLITS) for ending in (".npy", ".json")]
        + [f"train_loss-{i}.npy" for i in range(SPLITS)]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "train_loss-1.npy"), some_losses()[5:11])
    record = json.loads((tmp_path / "train_grad-1.json").read_text())
    assert sorted(record) == ["loss_sha256", "rows", "sha256", "store"]


def test_the_manifest_speaks_of_losses_only_where_there_are_some(tmp_path):
    without, with_losses = make(tmp_path / "without"), make(tmp_path / "with", losses=True)
    assert "losses" not in without.manifest and with_losses.manifest["losses"] is True
    assert without.store_id != with_losses.store_id
    assert without.manifest == {k: v for k, v in with_losses.manifest.items() if k != "losses"}


def test_the_checksum_follows_the_losses(tmp_path):
    one = fill(make(tmp_path / "a", losses=True), some_rows()).checksum
    assert one == fill(make(tmp_path / "b", losses=True), some_rows()).checksum
    other = fill(make(tmp_path / "c", losses=True), some_rows(), losses=some_losses() + 1)
    assert one != other.checksum


def test_a_store_without_losses_says_so(tmp_path):
    fill(make(tmp_path), some_rows())
    with pytest.raises(UserError, match="keeps no losses; make the train gradients again") as error:
        Store.open(tmp_path).losses()
    assert "\n" not in str(error.value)


def test_losses_of_an_unfinished_store_are_refused(tmp_path):
    store = fill(make(tmp_path, losses=True), some_rows(), shards=[0, 1, 3])
    with pytest.raises(UserError, match="shard 2 of 4 is not finished"):
        store.losses()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_loss_names_the_sample_and_the_run_can_go_on(tmp_path, value):
    store, bad = make(tmp_path, losses=True), some_losses()
    bad[8] = value
    with pytest.raises(UserError, match="the loss of sample 8 is NaN or infinite"):
        fill(store, some_rows(), losses=bad)
    np.testing.assert_array_equal(fill(store, some_rows()).losses(), some_losses())


def test_losses_must_be_given_where_they_are_kept_and_only_there(tmp_path):
    rows, losses = some_rows(), some_losses()
    store, without = make(tmp_path / "with", losses=True), make(tmp_path / "without")
    with pytest.raises(ValueError, match="keeps a loss with each row"):
        store.append(0, rows[:2], 0)
    with pytest.raises(ValueError, match="keeps no losses"):
        without.append(0, rows[:2], 0, losses[:2])
    with pytest.raises(ValueError, match=r"2 rows have 2 losses, not \[3\]"):
        store.append(0, rows[:2], 0, losses[:3])
    with pytest.raises(ValueError, match=r"not \[2, 1\]"):
        store.append(0, rows[:2], 0, losses[:2, None])


def test_a_store_with_losses_is_not_continued_without(tmp_path):
    make(tmp_path, losses=True)
    with pytest.raises(UserError, match="losses = True, not False"):
        make(tmp_path)


def damage_truncate(path):
    os.truncate(path, 140)


def damage_nan(path):
    losses = np.load(path)
    losses[3] = np.nan  # sample 14
    np.save(path, losses)


def damage_value(path):
    np.save(path, np.load(path) + 1)


def damage_type(path):
    np.save(path, np.load(path).astype(np.float64))


def damage_missing(path):
    path.unlink()


@pytest.mark.parametrize("damage, message", [
    (damage_truncate, "train_loss-2.npy is truncated"),
    (damage_nan, "the loss of sample 14 is NaN"),
    (damage_value, "checksum differs"),
    (damage_type, "does not hold 6 losses"),
    (damage_missing, "train_loss-2.npy is missing"),
])  # fmt: skip
def test_open_refuses_damaged_losses_and_its_remedy_mends_them(tmp_path, damage, message):
    fill(make(tmp_path, losses=True), some_rows())
    damage(tmp_path / "train_loss-2.npy")
    with pytest.raises(UserError) as error:
        Store.open(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "make that shard again: SHARDS=2 REPAIR=1 bash scripts/emoji/run_train_grad.sh" in str(
        error.value
    )
    store = Store.read_manifest(tmp_path)
    with pytest.raises(UserError, match="REPAIR=1"):
        pending_shards(store, range(store.num_split), repair=False)
    assert pending_shards(store, range(store.num_split), repair=True) == [2]
    assert (tmp_path / "train_grad-2.npy.damaged").exists()
    fill(make(tmp_path, losses=True), some_rows())
    np.testing.assert_array_equal(Store.open(tmp_path).losses(), some_losses())


def test_a_layout_without_the_flag_keeps_no_losses():
    assert Layout(N, K, 1, "float32").losses is False
