"""A store on object storage: the same rows as on disk, through kills and cut connections.

Against a server that speaks S3 (`s3`) where there is one, and fsspec's own in memory.
"""

import hashlib
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import s3
from stores import K, contents, fill, make, read, some_rows

from concept_trak.errors import TransientError, UserError
from concept_trak.settings import resolve
from concept_trak.store import remote, remote_writer
from concept_trak.store.chunks import Chunk
from concept_trak.store.manifest import Layout
from concept_trak.store.store import Store
from concept_trak.store.verify import pending_shards

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (extra s3)")
ROWS = some_rows()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("obstore", reason="obstore is not installed (extra s3)")
    running = s3.Server(tmp_path_factory.mktemp("moto") / "log")
    made = urllib.request.Request(f"http://127.0.0.1:{running.port}/bucket", method="PUT")
    urllib.request.urlopen(made).close()
    yield running
    running.stop()


@pytest.fixture
def proxy(server, monkeypatch):
    running = s3.Proxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(remote, "WAITS", (0.05, 0.1, 0.2))
    remote.filesystem.cache_clear()
    yield running
    running.stop()
    remote.filesystem.cache_clear()


@pytest.fixture(params=["memory", "s3"])
def address(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("proxy")
        return f"s3://bucket/{tmp_path.name}"
    remote.filesystem.cache_clear()
    return f"memory://bucket/{tmp_path.name}"


def base(address, tmp_path, machine="one"):
    """The copies on one of several machines."""
    return remote.local_base(address, str(tmp_path / machine))


@pytest.mark.parametrize("losses", [False, True])
def test_rows_on_object_storage_are_those_on_disk(address, tmp_path, losses):
    """Written by one machine, read by another; the files are the very ones."""
    whole = fill(make(tmp_path / "whole", "float16", losses=losses), ROWS)
    fill(make(base(address, tmp_path) / "x", "float16", losses=losses), ROWS)
    store = Store.open(base(address, tmp_path, "two") / "x")
    assert read(store).tobytes() == read(whole).tobytes()
    assert store.checksum == whole.checksum and store.where == f"{address}/x"
    assert (store.rows([22, 3]) == whole.rows([22, 3])).all()
    assert contents(store.folder) == contents(whole.folder)
    names = store.remote.names()
    assert {*contents(whole.folder)} == {*names}, "no piece is left"


def test_another_machine_goes_on_behind_the_last_piece(address, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_writer, "PIECE_BYTES", 2 * 4 * K)  # two rows
    first = make(base(address, tmp_path) / "x")
    (start, stop), made = first.shard_range(1), []
    first.append(1, ROWS[start : start + 2], start)
    first.append(1, ROWS[start + 2 : start + 3], start + 2)  # waits; lost with the machine
    second = make(base(address, tmp_path, "two") / "x")
    assert second.resume_row(1) == start + 2 and second.missing(1) == [(start + 2, stop)]
    for shard in second.pending():
        for row in range(second.resume_row(shard), second.shard_range(shard)[1]):
            second.append(shard, ROWS[row : row + 1], row)
            made.append(row)
        second.finish(shard)
    assert set(range(23)) - {*made} == {start, start + 1} and len(made) == len({*made})
    third = Store.open(base(address, tmp_path, "three") / "x")
    assert (read(third) == ROWS).all()


def test_a_shard_without_its_record_is_not_finished(address, tmp_path):
    """Killed between the rows and the commit."""
    store = make(base(address, tmp_path) / "x")
    fill(store, ROWS)
    store.remote.remove("train_grad-2.json")
    again = make(base(address, tmp_path, "two") / "x")
    assert again.pending() == [2] and pending_shards(again, range(4), repair=False) == [2]
    fill(again, ROWS)
    assert (read(Store.open(base(address, tmp_path, "three") / "x")) == ROWS).all()


def test_a_changed_object_is_refused_and_repaired(address, tmp_path):
    store = fill(make(base(address, tmp_path) / "x"), ROWS)
    content = bytearray(store.remote.read("train_grad-1.npy"))
    content[-1] ^= 1
    store.remote.write("train_grad-1.npy", bytes(content))
    with pytest.raises(UserError, match="train_grad-1.npy.*checksum differs.*SHARDS=1 REPAIR=1"):
        Store.open(base(address, tmp_path, "two") / "x")
    store.remote.write("train_grad-1.npy", bytes(content[:-4]))
    again = make(base(address, tmp_path, "three") / "x")
    with pytest.raises(UserError, match="bytes, not"):
        pending_shards(again, range(4), repair=False)
    assert pending_shards(again, range(4), repair=True) == [1]
    fill(again, ROWS)
    assert "train_grad-1.npy.damaged" in again.remote.names()
    assert (read(Store.open(base(address, tmp_path, "four") / "x")) == ROWS).all()


def test_a_copy_that_was_changed_is_fetched_again(address, tmp_path):
    fill(make(base(address, tmp_path) / "x"), ROWS)
    copy = base(address, tmp_path) / "x" / "train_grad-0.npy"
    copy.write_bytes(copy.read_bytes()[:-1] + b"\0")
    assert (read(Store.open(copy.parent)) == ROWS).all()


def test_a_disk_too_small_for_the_copy_is_told_before(address, tmp_path, monkeypatch):
    fill(make(base(address, tmp_path) / "x"), ROWS)
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr("concept_trak.store.verify.shutil.disk_usage", lambda _: full)
    with pytest.raises(UserError, match="MB free; free some or set STORE_CACHE"):
        Store.open(base(address, tmp_path, "two") / "x")


def test_other_settings_are_refused(address, tmp_path):
    make(base(address, tmp_path) / "x")
    with pytest.raises(UserError, match="was made with identity.model_hash"):
        make(base(address, tmp_path, "two") / "x", identity={"model_hash": "other"})


def test_cut_connections_lose_nothing(proxy, tmp_path):
    """Connections are reset in the middle of requests and of answers, at many places."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 512)).astype(np.float32)
    whole = Store.create(tmp_path / "whole", Layout(400, 512, 2, "float32"), {}, {})
    fill(whole, rows, batch=50)
    address = f"s3://bucket/{tmp_path.name}"
    proxy.cut_after(*rng.integers(100, 300_000, 12))
    store = Store.create(base(address, tmp_path) / "x", Layout(400, 512, 2, "float32"), {}, {})
    for shard in (0, 1):
        start, stop = store.shard_range(shard)
        for first in range(start, stop, 50):
            store.put_piece(Chunk(shard, first, first + 50), rows[first : first + 50])
        store.finish(shard)
    written = proxy.counted
    proxy.cut_after(*rng.integers(100, 300_000, 4))
    copy = Store.open(base(address, tmp_path, "two") / "x")
    assert written >= 3 and proxy.counted > written, (written, proxy.counted)
    assert contents(copy.folder) == contents(whole.folder)


def test_a_server_that_is_gone_is_told_and_what_was_committed_is_kept(proxy, tmp_path):
    address = f"s3://bucket/{tmp_path.name}"
    store = make(base(address, tmp_path) / "x")
    store.put_piece(Chunk(0, 0, 3), ROWS[:3])
    proxy.down = True
    with pytest.raises(TransientError, match="run the same again"):
        store.put_piece(Chunk(0, 3, 5), ROWS[3:5])
    proxy.down = False
    again = fill(make(base(address, tmp_path, "two") / "x"), ROWS)
    assert again.pending() == [] and (read(Store.open(again.folder)) == ROWS).all()


def test_a_bucket_that_is_not_there_is_told_at_once(proxy, tmp_path):
    with pytest.raises(UserError, match="s3://nowhere/x.*set GRAD_DIR"):
        make(base("s3://nowhere", tmp_path) / "x")


REFUSALS = [
    (403, "AccessDenied", "403 AccessDenied: told of AccessDenied; .*AWS_ACCESS_KEY_ID"),
    (403, "RequestTimeTooSkewed", "set the clock of this machine"),
    (403, "SignatureDoesNotMatch", "403 SignatureDoesNotMatch.*AWS_ACCESS_KEY_ID"),
    (401, "Unauthorized", "401 Unauthorized.*AWS_ACCESS_KEY_ID"),
    (301, "PermanentRedirect", "set AWS_REGION to the region of the bucket"),
    (400, "AuthorizationHeaderMalformed", "set AWS_REGION to the region of the bucket"),
    (404, "NoSuchBucket", "404 NoSuchBucket.*set GRAD_DIR to a bucket that is there"),
]


@pytest.fixture
def client(monkeypatch):
    """A function that lets obstore ask a port."""
    pytest.importorskip("obstore", reason="obstore is not installed (extra s3)")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))

    def ask(port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        remote.filesystem.cache_clear()

    yield ask
    remote.filesystem.cache_clear()


@pytest.mark.parametrize("status, code, said", REFUSALS)
def test_what_the_server_refuses_is_told_at_once_with_what_mends_it(
    client, tmp_path, status, code, said
):
    with s3.refusing(status, code) as (server, port):
        client(port)
        there = remote.Remote("s3://bucket/x", tmp_path)
        for act in (there.names, lambda: there.write("a", b"b")):
            server.asked = 0
            with pytest.raises(UserError, match=said) as told:
                act()
            assert server.asked == 1 and not isinstance(told.value, TransientError)
            assert len(str(told.value)) < 400 and "\n" not in str(told.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_has_no_time_is_asked_again(client, tmp_path, status):
    with s3.refusing(status, "SlowDown") as (server, port):
        client(port)
        there = remote.Remote("s3://bucket/x", tmp_path)
        with pytest.raises(TransientError, match=f"{status} SlowDown.*tried 3 times"):
            there.names()
        assert server.asked >= 3


@pytest.mark.parametrize("error, lasting", [
    (PermissionError("Access Denied"), True),
    (OSError(5, "An error occurred (RequestTimeTooSkewed) when calling ListObjectsV2"), True),
    (OSError(5, "An error occurred (PermanentRedirect) when calling ListObjectsV2"), True),
    (FileNotFoundError("The specified bucket does not exist"), True),
    (OSError(5, "An error occurred (SlowDown) when calling ListObjectsV2"), False),
    (ConnectionResetError("connection reset"), False),
    (TimeoutError("timed out"), False),
])  # fmt: skip
def test_what_lasts_is_known_of_every_client(error, lasting):
    assert remote._lasting(error) is lasting


SECRETS = [
    "s3://KEY:SECRET@bucket/p",
    "s3://KEY:SEC/SECRET@bucket/p",
    "s3://SECRET@bucket",
    "https://user:SECRET@host/p",
    "https://host/p?X-Amz-Signature=SECRET&X-Amz-Date=1",
    "file:///nowhere/x?sig=SECRET",
    "memory://bucket/p#SECRET",
]


@pytest.mark.parametrize("address", SECRETS)
def test_credentials_in_an_address_are_refused_before_they_are_told_or_kept(address, tmp_path):
    refusals = (
        lambda: remote.local_base(address, str(tmp_path)),
        lambda: resolve("emoji", {"grad_dir": address}),
    )
    for refused in refusals:
        with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as told:
            refused()
        assert "SECRET" not in str(told.value).replace("AWS_SECRET_ACCESS_KEY", "")
    assert not [*tmp_path.iterdir()]


def test_a_client_library_that_tells_credentials_is_not_repeated(tmp_path, monkeypatch):
    remote.filesystem.cache_clear()
    there = remote.Remote("memory://bucket/x", tmp_path)
    for told in SECRETS:
        error = PermissionError(f"no access to {told} today")
        monkeypatch.setattr(there, "fs", SimpleNamespace(pipe_file=raising(error)))
        with pytest.raises(UserError, match="cannot write a to memory://bucket/x") as said:
            there.write("a", b"")
        assert "SECRET" not in str(said.value)


def raising(error):
    def act(*_):
        raise error

    return act


@pytest.mark.parametrize("address, name", [
    ("s3://bucket/prefix", "s3-bucket-prefix-9737a7d8"),
    ("memory://bucket/a b/", "memory-bucket-a-b-0a3a86bc"),
    ("abfs://container@account.dfs.core.windows.net/x", None),
])  # fmt: skip
def test_copies_keep_the_place_they_had(address, name, tmp_path):
    folder = remote.local_base(address, str(tmp_path))
    url = address.rstrip("/")
    hashed = hashlib.sha256(url.encode()).hexdigest()[:8]
    assert folder.name.endswith(hashed) and (name is None or folder.name == name)
    assert remote.address_of(folder) == url


@pytest.mark.parametrize("mark", ["", "{", "{}", "[]", '{"url": 5}', '{"url": "s3://other/x"}'])
def test_a_damaged_record_of_an_address_is_one_line(mark, tmp_path):
    folder = remote.local_base("memory://bucket/x", str(tmp_path))
    (folder / remote.MARK).write_text(mark)
    with pytest.raises(UserError, match="remove the folder, which holds copies alone: rm -r"):
        remote.remote_of(folder / "store")


def test_an_address_that_nothing_serves_is_told(tmp_path):
    with pytest.raises(UserError, match=r"pip install 'concept-trak\[s3\]'"):
        make(base("gopher://bucket/y", tmp_path) / "x")
