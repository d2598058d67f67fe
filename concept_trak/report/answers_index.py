"""index.html of a results folder: every answer in it, the newest first; and `latest`, a link to
that one.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from ..atomic_io import link, locked, write_bytes
from ..attribution.naming import NOT_DECIDING
from ..errors import UserError
from ..settings import EMOJI, Settings
from .page import environment
from .saved_answer import PAGE, read_asked

# in columns of their own, or without effect on the answer
SHOWN_ELSEWHERE = {"prompt", "target_concepts", "seed", "top_k", "render_leastk", *NOT_DECIDING} - {
    "methods",
    "weights",
}


def write_index(newest: Path) -> None:
    """List the answers beside the folder `newest`, itself among them. UserError for a full disk."""
    with locked(newest.parent):
        found = [folder for folder in newest.parent.iterdir() if (folder / PAGE).is_file()]
        rows = [_row(f) for f in sorted(found, key=_made, reverse=True) if not f.is_symlink()]
        html = environment().get_template("index.html.jinja").render(rows=rows)
        write_bytes(newest.parent / "index.html", html.encode())
        link(newest.parent / "latest", newest)


def _made(folder: Path) -> float:
    return (folder / PAGE).stat().st_mtime


def _row(folder: Path) -> dict[str, Any]:
    """What the index says of an answer; little of one that another version wrote."""
    try:
        asked = read_asked(folder)
    except UserError:
        asked = {}
    settings = asked.get("settings", {})
    return {
        "page": f"{folder.name}/{PAGE}",
        "prompt": asked.get("prompt", folder.name),
        "targets": asked.get("targets", []),
        "seed": settings.get("seed", ""),
        "settings": changed_settings(settings),
        "made": datetime.fromtimestamp(_made(folder)).strftime("%Y-%m-%d %H:%M"),
    }


def changed_settings(settings: dict[str, Any]) -> list[str]:
    """NAME=value of what differs from the emoji benchmark's defaults, places and words left out."""
    usual = Settings().flat() | EMOJI
    changed = {
        k: v
        for k, v in settings.items()
        if k in usual and v != usual[k] and k not in SHOWN_ELSEWHERE
    }
    return [f"{name.upper()}={value}" for name, value in changed.items()]
