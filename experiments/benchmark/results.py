"""The folder of an evaluation: named by the hash of all that decides it, there when it is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from concept_trak.atomic_io import atomic_folder, link, write_json
from concept_trak.attribution.naming import settings_digest
from concept_trak.settings import Settings, as_dict, provenance, results_folder

SCOPE_SETTINGS = (
    "num_queries",
    "methods",
    "task_idx",
)  # decide what is evaluated, but no single answer
LATEST = "latest"


@contextlib.contextmanager
def result_folder(settings: Settings, kind: str, name: str, made_from: Any) -> Iterator[Path]:
    """A folder to fill, which becomes {kind}/{name}-{hash} in RESULTS_DIR when the block ends, and
    the one that `latest` there names.

    made_from: what decides the results beside the settings (JSON): the model, the pictures.
    UserError for a disk that does not take it.
    """
    asked = {field: getattr(settings, field) for field in SCOPE_SETTINGS}
    below = results_folder(settings, kind)
    folder = below / f"{name}-{settings_digest(settings, asked, made_from)}"
    with atomic_folder(folder) as made:
        yield made
    link(below / LATEST, folder)
    print(f"results: {folder}")


def write_metrics(folder: Path, name: str, found: dict[str, Any], settings: Settings) -> None:
    """{name}.json: what was found, beside the settings and versions that made it."""
    made = {"settings": as_dict(settings), "provenance": provenance()}
    write_json(folder / f"{name}.json", {**found, **made})
