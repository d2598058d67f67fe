"""Stores on object storage: s3://bucket/prefix, or any other address that fsspec knows.

A folder there has the files of a store (`folder`, `pieces`) under the same names. Objects appear
whole or not at all, but nothing can be renamed in one step, so a finished shard is what its record
says is one: rows and losses are uploaded first, and train_grad-{i}.json with their sha256 is the
commit. Until then its rows lie there in pieces.

On this machine a store has a copy that is filled as it is read: a folder like that of any other
store, below STORE_CACHE, so rows are memory-mapped from it. It can be removed at any time.

Connections that are cut are tried again, `WAITS` apart, over what the client library does itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import secrets
import shlex
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ..atomic_io import disk_errors, make_folder, sha256_file, write_bytes, write_json
from ..errors import TransientError, UserError
from ..network import without_credentials
from ..parsing import refuse_credentials
from ..validated_io import read_json

MARK = ".remote.json"  # in the folder of the copies of an address
MANIFEST = "manifest.json"
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
LISTING_SECONDS = 10.0  # how old a listing may be; other machines write, too
OBSTORE = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "abfs"}
# Obstore has classes of its own for what no further try mends.
PERMANENT_ERRORS = (PermissionError, ValueError, TypeError, NotImplementedError, ImportError)
LASTING_NAMES = (
    *("PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "NotSupportedError"),
    *("UnknownConfigurationKeyError", "NoCredentialsError"),
)
# Of a listing it tells an answer of the server as it does a cut connection, in words alone.
STATUS = re.compile(r"status code: (\d{3})")
PASSING = (408, 409, 425, 429)  # of HTTP's refusals, those that a further try may mend
ANSWER = re.compile(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*)</Message>)?")
SKEWED, BUCKET = "TooSkewed|RequestExpired", "NoSuchBucket|InvalidBucketName"
REGION = "redirect without LOCATION|PermanentRedirect|HeaderMalformed"
Result = TypeVar("Result")


def is_address(place: str) -> bool:
    """Whether a folder is one on object storage."""
    return "://" in place


def local_base(place: str, cache: str = "") -> Path:
    """The folder of the stores at `place`: itself or, for an address, that of their copies.

    cache: below which copies lie; empty: ~/.cache/concept-trak/stores. UserError as
    `parsing.refuse_credentials`.
    """
    if not is_address(place):
        return Path(place)
    refuse_credentials(place)
    url = place.rstrip("/")
    root = Path(cache).expanduser() if cache else Path.home() / ".cache/concept-trak/stores"
    folder = make_folder(root / _name_of(url))
    if not (folder / MARK).exists():
        write_json(folder / MARK, {"url": url})
    return folder


def _name_of(url: str) -> str:
    """Of the folder of the copies of an address."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", url)[-60:].strip("-")
    return f"{plain}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def address_of(base: Path) -> str | None:
    """The address whose stores have their copies in a folder; None for any other folder. UserError
    for a folder that says another address than that of its name.
    """
    mark = base / MARK
    if not os.path.lexists(mark):
        return None
    mend = f"remove the folder, which holds copies alone: rm -r {shlex.quote(str(base))}"
    url = read_json(mark, mend).get("url")
    if not isinstance(url, str) or _name_of(url) != base.name:
        raise UserError(f"{mark} does not name the address of its folder; {mend}")
    return url


def remote_of(folder: Path) -> Remote | None:
    """The folder on object storage that a store's folder is a copy of, if it is one."""
    url = address_of(Path(folder).parent)
    return None if url is None else Remote(f"{url}/{Path(folder).name}", Path(folder))


def bring_manifests(base: Path, prefix: str) -> None:
    """Have the copies in `base` begin as the stores of the address do that are named `prefix`...;
    nothing happens in any other folder.
    """
    if (url := address_of(base)) is None:
        return
    there = {name for name in Remote(url, base).folders() if name.startswith(prefix)}
    here = {path.name for path in base.glob(f"{prefix}*") if path.is_dir()}
    for name in there | here:
        Remote(f"{url}/{name}", base / name).bring(MANIFEST)


@functools.lru_cache(maxsize=8)
def filesystem(protocol: str) -> Any:
    """fsspec's file system of a protocol, obstore's where that is installed. UserError if nothing
    serves it.
    """
    try:
        import fsspec

        with contextlib.suppress(ImportError):
            from obstore.fsspec import FsspecStore

            if protocol in OBSTORE:
                plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
                backoff = {"init_backoff": timedelta(seconds=0.2), "base": 2}
                return FsspecStore(
                    OBSTORE[protocol],
                    skip_instance_cache=True,  # the environment may name another server by now
                    client_options={"allow_http": plain, "timeout": "120s"},
                    retry_config={
                        "max_retries": 3,
                        "retry_timeout": timedelta(seconds=30),
                        "backoff": backoff | {"max_backoff": timedelta(seconds=5)},
                    },
                )
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{protocol}:// cannot be opened ({reason}); run: pip install 'concept-trak[s3]'"
        ) from None


class Remote:
    """A folder on object storage, and the folder of its copy.

    Everything is tried again after a cut connection; TransientError when that does not help,
    UserError for what does not pass: no such bucket, no permission.
    """

    def __init__(self, url: str, copy: Path) -> None:
        self.url, self.copy = url.rstrip("/"), copy
        protocol, _, self.root = self.url.partition("://")
        self.fs = filesystem(protocol)
        self._names: dict[str, int] = {}
        self._listed = -LISTING_SECONDS
        self._brought: set[str] = set()

    def folders(self) -> list[str]:
        """Names of the folders in this one."""
        return [name for name, size in self._list().items() if size < 0]

    def names(self) -> dict[str, int]:
        """{name: bytes} of the objects, from a listing that is at most `LISTING_SECONDS` old."""
        if time.monotonic() - self._listed > LISTING_SECONDS:
            self._names = {name: size for name, size in self._list().items() if size >= 0}
            self._listed = time.monotonic()
        return self._names

    def refresh(self) -> None:
        """List again when next asked."""
        self._listed = -LISTING_SECONDS
        self._brought.clear()

    def _list(self) -> dict[str, int]:
        """{name: bytes, or -1 for a folder}."""

        def action() -> list[dict]:
            self.fs.invalidate_cache()
            try:
                return self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                if "/" not in self.root:
                    raise
                return []

        found = {}
        for entry in self._try(action, "list"):
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            found[name] = -1 if entry["type"] == "directory" else int(entry["size"])
        return found

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is none."""

        def action() -> bytes | None:
            try:
                return bytes(self.fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

        return self._try(action, f"read {name} of")

    def write(self, name: str, content: bytes) -> None:
        """One PUT."""
        self._try(lambda: self.fs.pipe_file(self._path(name), content), f"write {name} to")
        self._names[name] = len(content)

    def upload(self, path: Path, name: str) -> None:
        """A file, in parts if it is large; the object is there when all of them are."""
        target, size = self._path(name), path.stat().st_size

        def action() -> None:
            self.fs.put_file(str(path), target)
            self.fs.invalidate_cache()
            if (found := int(self.fs.info(target)["size"])) != size:
                raise ConnectionError(f"{found} of {size} bytes arrived")

        self._try(action, f"write {name} to")
        self._names[name] = size

    def download(self, name: str, path: Path, digest: str | None = None) -> None:
        """An object as the file `path`, which appears when it is whole.

        digest: its sha256; UserError if what is there is something else.
        """
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")

        def action() -> None:
            self.fs.get_file(self._path(name), str(part))
            if (found := part.stat().st_size) != (size := self.names().get(name, found)):
                raise ConnectionError(f"{found} of {size} bytes arrived")

        try:
            self._try(action, f"read {name} of")
            if digest is not None and sha256_file(part) != digest:
                raise UserError(f"{self.url}/{name} is not what was finished (checksum differs)")
            with disk_errors(path):
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Nothing happens if it is gone."""

        def action() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._path(name))

        self._try(action, f"remove {name} from")
        self._names.pop(name, None)

    def rename(self, name: str, other: str) -> None:
        """Copy, then remove; nothing happens if it is not there."""
        self.refresh()
        if name in self.names():
            source, target = self._path(name), self._path(other)
            self._try(lambda: self.fs.cp_file(source, target), f"copy {name} in")
            self.remove(name)

    def bring(self, name: str) -> Path:
        """A small file's copy, once in this process: as it is there, or gone if it is not."""
        path = self.copy / name
        if name not in self._brought:
            content = self.read(name)
            if content is None:
                path.unlink(missing_ok=True)
                return path
            make_folder(self.copy)
            if not path.exists() or path.read_bytes() != content:
                write_bytes(path, content)
            self._brought.add(name)
        return path

    def keep(self, name: str) -> None:
        """A small file of the copy, there."""
        self.write(name, (self.copy / name).read_bytes())
        self._brought.add(name)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _try(self, action: Callable[[], Result], what: str) -> Result:
        for wait in (*WAITS, None):
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - each library has classes of its own
                reason = _reason(error)
                if _lasting(error):
                    raise UserError(f"cannot {what} {self.url}: {reason}; {_mend(error)}") from None
                if wait is None:
                    tried = f"tried {len(WAITS) + 1} times over {sum(WAITS):.0f} s"
                    raise TransientError(
                        f"cannot {what} {self.url}: {reason} ({tried}); check the connection and "
                        "run the same again: what was committed is kept"
                    ) from None
                time.sleep(wait * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")


def _reason(error: Exception) -> str:
    """What a client library tells, in a short line: of an answer of the server, its own words."""
    text = " ".join(str(error).partition("Debug source:")[0].split())
    status, answer = STATUS.search(text), ANSWER.search(text)
    if answer:
        text = ": ".join(
            filter(None, [f"{status[1] if status else 'error'} {answer[1]}", answer[2]])
        )
    return without_credentials(text)[-200:] or type(error).__name__


def _lasting(error: Exception) -> bool:
    """Whether no further try mends it."""
    told = STATUS.search(str(error))
    if told and 300 <= int(told[1]) < 500:
        return int(told[1]) not in PASSING
    if re.search(f"{SKEWED}|{BUCKET}|{REGION}", str(error)):
        return True
    missing = isinstance(error, FileNotFoundError)
    return missing or isinstance(error, PERMANENT_ERRORS) or type(error).__name__ in LASTING_NAMES


def _mend(error: Exception) -> str:
    """What mends an error that lasts."""
    if re.search(SKEWED, str(error)):
        return "set the clock of this machine and run the same again"
    if re.search(REGION, str(error)):
        return "set AWS_REGION to the region of the bucket and run the same again"
    if re.search(BUCKET, str(error)):
        return "set GRAD_DIR to a bucket that is there"
    return "set GRAD_DIR to what is there, or the credentials (AWS_ACCESS_KEY_ID, ...)"
