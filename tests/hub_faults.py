"""A hub that answers otherwise than it should, and the two downloads from it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hub_server import HubServer
from spoils import ODD, places, replaced
from tqdm import TMonitor

PATHS = (
    *("json/../../evil.json", "/tmp/evil.json", "json//x.json", "./json/x.json", "json/", "."),
    *("JSON/test_artchive.json", "json/te\u0301st.json", "json/" + "a" * 300, "json\\..\\x", "~/x"),
    *("json/\u202egnosj", "json/\x1b[2J.json", "json/test_artchive.json/x", "json/x\n.json", "con"),
)
LINKS = (
    *("file:///etc/passwd", "http://127.0.0.1:1/", "//localhost/", "http://[", "\x00", "x" * 9000),
    *("?cursor=0", "http://user:word@127.0.0.1/", "https://huggingface.co/api", " "),
)
BODIES = ({}, None, "text", 3, [1], [[]], [None], [{}], [{"path": "json/a.json"}], [[[]] * 50])
CONTENT = (
    *("wrong", "longer:1", "longer:900000", "truncate:0", "truncate:10", "cut:0", "cut:5"),
    *("status:400", "status:401", "status:403", "status:404", "status:418", "status:429"),
    *("status:500", "status:503", "missing", "limited:100000", "whole"),
)


class Hub:
    """The server, with the files of both downloads; `verbs`: {verb: flags that need a folder}."""

    def __init__(self) -> None:
        from experiments.abc.download import release
        from experiments.abc.download.parts import GEN_DATA, UNLEARNING

        self.server = HubServer()
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        name = f"{release.SETTINGS_NAME}/train_grad"
        shards = {f"{name}-{i}.npy": bytes([i + 1] * 160) for i in range(3)}
        small = {"json/test_artchive.json": b"[]", "path_to_prompts.json": b"{}"}
        small["imagenet_class_to_categories.json"] = b"{}"
        self.server.repos = {release.SOURCE: shards, GEN_DATA: small, UNLEARNING: {}}

    def digests(self) -> list[str]:
        """sha256 of every file."""
        files = [data for repo in self.server.repos.values() for data in repo.values()]
        return [hashlib.sha256(data).hexdigest() for data in files]


def cases_of_page() -> Iterator[tuple[str, Callable[[list, str, str], tuple[Any, str]]]]:
    """(name, change of a page of the listing)."""
    sample = {"type": "file", "oid": "", "size": 1, "path": "", "lfs": {"oid": "", "size": 1}}
    for place in places(sample):
        for odd in ODD:
            yield (
                f"{'.'.join(place)}={str(odd)[:12]!r}",
                functools.partial(one_entry, place=place, odd=odd),
            )
    for path in PATHS:
        yield f"path={path[:20]!r}", functools.partial(one_entry, place=("path",), odd=path)
        yield f"more {path[:20]!r}", functools.partial(one_more, path=path)
    for i, body in enumerate(BODIES):
        yield f"body #{i}", functools.partial(other_body, body=body)
    for link in LINKS:
        yield f"next={link[:20]!r}", functools.partial(other_link, to=link)
    yield "all twice", lambda entries, link, here: (entries * 2, link)
    yield "itself", lambda entries, link, here: (entries, here)
    yield "no files", lambda entries, link, here: ([], "")


def one_entry(
    entries: list, link: str, here: str, place: tuple[str, ...], odd: Any
) -> tuple[list, str]:
    first = next(e for e in entries if e["type"] == "file")
    known = first | {"lfs": first.get("lfs") or {"oid": "0" * 64, "size": first["size"]}}
    return [replaced(known, place, odd) if e is first else e for e in entries], link


def one_more(entries: list, link: str, here: str, path: str) -> tuple[list, str]:
    first = next(e for e in entries if e["type"] == "file")
    return [*entries, first | {"path": path}], link


def other_body(entries: list, link: str, here: str, body: Any) -> tuple[Any, str]:
    return body, link


def other_link(entries: list, _: str, here: str, to: str) -> tuple[list, str]:
    return entries, to


def quick(event: threading.Event, timeout: float | None = None, wait: Any = None) -> bool:
    of_bars = isinstance(threading.current_thread(), TMonitor)  # which would never rest
    return wait(event, timeout if of_bars else timeout and 0.001)


@contextlib.contextmanager
def answering(hub: Hub, page: Any = None, info: Any = None, faults: Any = None) -> Iterator[None]:
    """The hub answers so, and no wait of the client takes time."""
    server, wait = hub.server, threading.Event.wait
    server.change_page, server.change_info, server.faults = page, info, dict(faults or {})
    no_wait = functools.partialmethod(quick, wait=wait)
    here = {"HF_ENDPOINT": server.url, "no_proxy": "*", "HF_HUB_OFFLINE": ""}
    with (
        mock.patch.dict(os.environ, here),
        mock.patch.object(time, "sleep", lambda _: None),
        mock.patch.object(threading.Event, "wait", no_wait),
        mock.patch("experiments.abc.download.folder.SPARE", 0),
    ):
        yield


def cases(hub: Hub, folder: Path) -> Iterator[tuple[str, str, dict[str, Any], Any]]:
    """(name, verb, flags, context of the run); what is downloaded goes below `folder`."""
    verbs = {
        "download-abc": {"data_dir": folder / "abc", "parts": "json", "max_workers": 1},
        "download-train-grad": {"grad_root": folder / "released", "count": 3, "rows": 5, "dim": 8},
    }
    files = {"download-abc": "json/test_artchive.json", "download-train-grad": None}
    for verb, flags in verbs.items():
        for name, page in cases_of_page():
            yield f"{verb} {name}", verb, flags, functools.partial(answering, hub, page=page)
        for odd in (*ODD, "c0ffee", "../main"):
            for key in ("sha", "id"):
                info = functools.partial(lambda known, k, v: known | {k: v}, k=key, v=odd)
                context = functools.partial(answering, hub, info=info)
                yield f"{verb} info {key}={str(odd)[:12]!r}", verb, flags, context
        shard = next(p for files in hub.server.repos.values() for p in files if "train_grad" in p)
        for where in ("info", "tree", files[verb] or shard):
            for fault in CONTENT:
                if where in ("info", "tree") and not fault.startswith(("status", "missing", "lim")):
                    continue
                for ever in ("", "!"):
                    context = functools.partial(answering, hub, faults={where: [fault + ever]})
                    yield f"{verb} {where[-20:]} {fault}{ever}", verb, flags, context
