"""What a Hugging Face repository holds, at one commit, with sizes and checksums; and patience with
failures that pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from dataclasses import dataclass

from ...errors import UserError

TRIES = 5  # failures in a row, without a new byte, before giving up
WAIT = 1.0  # seconds after the first failure; doubled after each further one
LISTING_TIMEOUT = 60
TRANSIENT = (
    408,
    416,
    429,
    500,
    502,
    503,
    504,
)  # 416: the hub's file is shorter than what is here; begun anew


class Stopped(Exception):
    """Another download failed, or the user interrupted: what is on disk stays for the next call."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at the commit that was listed."""

    repo: "Repo"
    path: str
    size: int
    # "sha256:..." of a large file; "git:..." (the sha1 of the git blob) of a small one, for which
    # the hub gives no sha256
    digest: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Repo:
    """A repository on the hub that HF_ENDPOINT names. UserError, in one line, for whatever keeps it
    from being read.
    """

    def __init__(self, repo_id: str, repo_type: str = "dataset"):
        from huggingface_hub import HfApi

        self.repo_id, self.repo_type, self.commit = repo_id, repo_type, "main"
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip(
            "/"
        )  # the library reads it at import only
        if not self.endpoint.startswith(("http://", "https://")):
            raise UserError(
                f"HF_ENDPOINT={self.endpoint} is not a web address; give one that begins with "
                "https://, or unset it"
            )
        self.api = HfApi(endpoint=self.endpoint)

    def files(self, folder: str = "") -> list[RemoteFile]:
        """Every file below a folder, at the newest commit."""
        what = f"{self.repo_id}/{folder}".rstrip("/")
        patience = Patience(self, what, threading.Event())
        while True:
            try:
                return self._ask(folder)
            except network_errors() as error:
                patience.endure(error)
            except (
                ValueError,
                KeyError,
                TypeError,
            ) as error:  # a page that is no listing; or a name that is none
                raise UserError(
                    f"{what}: {self.endpoint} does not answer as a hub does ({short(error)}); "
                    "check the name and HF_ENDPOINT"
                ) from error

    def _ask(self, folder: str) -> list[RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        quieten()
        self.commit = self.api.repo_info(
            self.repo_id, repo_type=self.repo_type, timeout=LISTING_TIMEOUT
        ).sha
        entries = self.api.list_repo_tree(
            self.repo_id,
            folder or None,
            recursive=True,
            revision=self.commit,
            repo_type=self.repo_type,
        )
        return [
            RemoteFile(
                self, e.path, e.size, f"sha256:{e.lfs.sha256}" if e.lfs else f"git:{e.blob_id}"
            )
            for e in entries
            if isinstance(e, RepoFile)
        ]


class Patience:
    """Waits after a failure that may pass, longer each time; UserError for one that lasts."""

    def __init__(self, repo: Repo, what: str, stop: threading.Event):
        self.repo, self.what, self.stop, self.failures = repo, what, stop, 0

    def endure(self, error: Exception) -> None:
        """Return when it is time for the next try."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        self.failures += 1
        if (
            self.failures >= TRIES
            or (status is not None and status not in TRANSIENT)
            or _is_offline(error)
        ):
            raise self._refusal(error, status) from error
        seconds = WAIT * 2 ** (self.failures - 1)
        say(f"{self.what}: {short(error)}; trying again in {seconds:g} s")
        if self.stop.wait(seconds):
            raise Stopped

    def _refusal(self, error: Exception, status: int | None) -> UserError:
        host = self.repo.endpoint
        if _is_offline(error):
            return UserError("HF_HUB_OFFLINE is set; unset it to download")
        if status in (401, 403):
            return UserError(
                f"{self.what}: {host} refuses access ({status}): private, gated or not there; "
                "check the name, or set HF_TOKEN to a token that may read it"
            )
        if status == 404:
            return UserError(
                f"{self.what} is not on {host} ({self.repo.repo_type}); check the name, or run "
                "again later: finished files are kept"
            )
        return UserError(
            f"{self.what}: no success with {host} in {self.failures} tries ({short(error)}); "
            "check the network and HF_ENDPOINT, then run again: what is here is kept"
        )


def _is_offline(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def network_errors() -> tuple:
    """What a failed request raises: the HTTP client is another one in each major version of
    huggingface_hub (requests' are OSErrors).
    """
    clients = [
        importlib.import_module(name)
        for name in ("httpx2", "httpx")
        if importlib.util.find_spec(name)
    ]
    return (OSError, *(client.HTTPError for client in clients))


def short(error: Exception) -> str:
    """An error's message in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def say(line: str) -> None:
    """Print a line without tearing the progress bar."""
    from tqdm import tqdm

    tqdm.write(line)


def quieten() -> None:
    """The library's own bars and warnings would tear ours; what matters is told by `Patience`."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
