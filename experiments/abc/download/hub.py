"""What a Hugging Face repository holds at one commit, with sizes and checksums; the bytes of its
files, from any place on; and patience with failures that pass.

`hf_hub_download` is not used. As of huggingface_hub 2.4 each call begins a file anew (a killed one
leaves its bytes on the disk for ever), compares no checksum, ends at the first 5xx, and overwrites
any file of that name. So the bytes come over the session that the library offers for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

from concept_trak.errors import UserError
from concept_trak.network import check_reachable

from .progress import say

TRIES = 5  # failures in a row, without a new byte, before giving up
WAIT = 1.0  # seconds after the first failure
BACKOFF = 3  # times as long after each further one: 40 seconds in all
CHUNK = 2**20  # bytes read at a time: what a cut connection loses at most
LISTING_TIMEOUT = 60
MAX_PAGES, MAX_FILES = 1000, 100_000  # of a listing: many times what a release has
TRANSIENT = (408, 429, 500, 502, 503, 504)


class DownloadCancelled(Exception):
    """Another download failed, or the user interrupted: what is on disk stays for the next call."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at the commit that was listed."""

    repo: Repo
    path: str
    size: int
    # "sha256:..." of a large file; "git:..." (the sha1 of the git blob) of a small one, for which
    # the hub gives no sha256
    digest: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def content(self, start: int) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) from byte `start` to the end.

        The offset falls back to 0 where the hub sends no ranges or has no byte `start`.
        Raises network_errors() for what `RetryPolicy` endures.
        """
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status

        repo, session = self.repo, get_session()
        # The address on the hub, not the signed one behind its redirect: that expires while a large
        # file is under way.
        place = {"repo_type": repo.repo_type, "revision": repo.commit, "endpoint": repo.endpoint}
        url = hf_hub_url(repo.repo_id, self.path, **place)
        asked = {"headers": headers(start), "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        is_httpx = callable(session.stream)  # of requests, before huggingface_hub 1.0, it is a flag
        opened = session.stream if is_httpx else partial(session.request, stream=True)
        with opened("GET", url, **asked) as response:
            if response.status_code == 416:
                yield 0, b""
                return
            hf_raise_for_status(response)
            offset = start if response.status_code == 206 else 0
            chunks = response.iter_bytes if is_httpx else response.iter_content
            for chunk in chunks(CHUNK):
                yield offset, chunk
                offset += len(chunk)


def headers(start: int) -> dict[str, str]:
    """For the bytes from `start` on. The client drops the token when it is sent to another host."""
    from huggingface_hub import constants, get_token

    # ranges count the bytes of the file, not of a compressed one
    found = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return found | ({"Authorization": f"Bearer {token}"} if token else {})


class Repo:
    """A repository on the hub that HF_ENDPOINT names. UserError, in one line, for whatever keeps it
    from being read.
    """

    def __init__(self, repo_id: str, repo_type: str = "dataset") -> None:
        self.repo_id, self.repo_type, self.commit = repo_id, repo_type, "main"
        # the library reads it at import only
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not self.endpoint.startswith(("http://", "https://")):
            raise UserError(
                f"HF_ENDPOINT={self.endpoint} is not a web address; give one that begins with "
                "https://, or unset it"
            )

    def files(self, folder: str = "") -> list[RemoteFile]:
        """Every file below a folder, at the newest commit."""
        what = f"{self.repo_id}/{folder}".rstrip("/")
        patience = RetryPolicy(self, what, threading.Event())
        while True:
            try:
                return self._listed(folder)
            except network_errors() as error:
                patience.endure(error)
            # a page that is no listing; or a name that is none
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{what}: {self.endpoint} does not answer as a hub does ({short(error)}); "
                    "check the name and HF_ENDPOINT"
                ) from error

    def _listed(self, folder: str) -> list[RemoteFile]:
        """ValueError for a listing that does not end, or names what no repository can hold."""
        from huggingface_hub import constants, get_session

        if not constants.HF_HUB_OFFLINE:  # which the session says itself, better
            check_reachable(
                self.endpoint, "what is here is kept; connect, or set HF_ENDPOINT to a mirror"
            )
        root = f"{self.endpoint}/api/{self.repo_type}s/{self.repo_id}"
        self.commit = self._page(get_session(), root)[0]["sha"]
        if not isinstance(self.commit, str) or not re.fullmatch(r"[0-9a-f]{1,64}", self.commit):
            raise ValueError("the commit is no hash")
        url = f"{root}/tree/{self.commit}/{quote(folder)}".rstrip("/") + "?recursive=True"
        found: dict[str, RemoteFile] = {}
        pages: set[str] = set()
        while url:
            if url in pages or len(pages) >= MAX_PAGES or len(found) > MAX_FILES:
                raise ValueError("its listing does not end")
            pages.add(url)
            entries, url = self._page(get_session(), url)
            for entry in entries:
                if entry["type"] == "file":
                    file = self._checked(entry)
                    if found.setdefault(file.path, file) is not file:
                        raise ValueError(f"it lists {file.path!r} twice")
        return list(found.values())

    def _page(self, session: Any, url: str) -> tuple[Any, str]:
        """(JSON, address of the next page or empty) of a page of the hub's own."""
        from huggingface_hub.utils import hf_raise_for_status

        response = session.get(url, headers=headers(0), timeout=LISTING_TIMEOUT)
        hf_raise_for_status(response)
        following = response.links.get("next", {}).get("url", "")
        if following and urlsplit(following)[:2] != urlsplit(self.endpoint)[:2]:
            raise ValueError("its listing goes on at another host")
        return response.json(), following

    def _checked(self, entry: dict[str, Any]) -> RemoteFile:
        """An entry of the listing as a file; ValueError for one that cannot be."""
        path, size, large = entry["path"], entry["size"], entry.get("lfs")
        parts = path.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or "\0" in path or "\\" in path:
            raise ValueError(f"it lists {path[:80]!r}, which is no path inside a repository")
        kind, digest = ("sha256", large["oid"]) if large else ("git", entry["oid"])
        if type(size) is not int or size < 0:
            raise ValueError(f"it lists {path!r} with the size {size!r}")
        if not re.fullmatch(r"[0-9a-f]{64}" if large else r"[0-9a-f]{40}", digest):
            raise ValueError(f"it lists {path!r} without a checksum")
        return RemoteFile(self, path, size, f"{kind}:{digest}")


class RetryPolicy:
    """Waits after a failure that may pass, longer each time; UserError for one that lasts."""

    def __init__(self, repo: Repo, what: str, stop: threading.Event) -> None:
        self.repo, self.what, self.stop, self.failures = repo, what, stop, 0

    def endure(self, error: Exception) -> None:
        """Return when it is time for the next try."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        self.failures += 1
        lasts = self.failures >= TRIES or status not in (None, *TRANSIENT)
        if lasts or _is_offline(error):
            raise self._refusal(error, status) from error
        seconds = asked_wait(response) or WAIT * BACKOFF ** (self.failures - 1)
        say(f"{self.what}: {short(error)}; trying again in {seconds:g} s")
        if self.stop.wait(seconds):
            raise DownloadCancelled

    def _refusal(self, error: Exception, status: int | None) -> UserError:
        host = self.repo.endpoint
        if _is_offline(error):
            return UserError("HF_HUB_OFFLINE is set; to download, unset HF_HUB_OFFLINE")
        if status in (401, 403):
            return UserError(
                f"{self.what}: {host} refuses access ({status}): private, gated or not there; "
                "check the name, or set HF_TOKEN to a token that may read it"
            )
        if status == 404:
            return UserError(
                f"{self.what} is not on {host} ({self.repo.repo_type}); check the name in "
                "PATH_IN_REPO or PARTS, "
                "or run the same again later: finished files are kept"
            )
        return UserError(
            f"{self.what}: no success with {host} in {self.failures} tries ({short(error)}); "
            "check the network and HF_ENDPOINT, then run the same again: what is here is kept"
        )


def asked_wait(response: object) -> float:
    """Seconds that the hub asks for: to the end of its rate limit's window, or as Retry-After says.
    0 if it asks for none.
    """
    given = getattr(response, "headers", {})
    found = re.search(r"r=0;\s*t=(\d+)", given.get("RateLimit", "")) or re.fullmatch(
        r"(\d+)", given.get("Retry-After", "")
    )
    return float(found[1]) + 1 if found else 0.0  # the hub's seconds are rounded


def _is_offline(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def network_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises: the HTTP client is another one in each major version of
    huggingface_hub (requests' are OSErrors).
    """
    clients = [name for name in ("httpx2", "httpx") if importlib.util.find_spec(name)]
    return (OSError, *(importlib.import_module(name).HTTPError for name in clients))


def short(error: Exception) -> str:
    """An error's message in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
