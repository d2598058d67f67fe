"""The one way through every protocol: prompts, pictures of both pipelines, measure, table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from concept_trak.atomic_io import write_bytes
from concept_trak.attribution.prompts import contains, split_list
from concept_trak.components.edits import Edit
from concept_trak.errors import UserError
from concept_trak.process import log
from concept_trak.report.tables import csv_bytes
from concept_trak.settings import Settings
from experiments.benchmark.results import result_folder, write_metrics

from .images import PairedSampler, edits_of
from .nudity import Nudity
from .objects import Objects
from .prompts import PromptRow, SampleRequest, asks, read_lines
from .result import ProtocolResult
from .retention import Retention
from .styles import Styles

MEASURING = ("torchmetrics", "nudenet", "onnxruntime", "torch-fidelity", "torchvision")


class Published(Protocol):
    """A protocol. sentences: with "{}" for the class or artist, empty where prompts have none.
    own: our few prompts, where PROMPTS_FILE names none.
    """

    sentences: tuple[str, ...]
    own: Sequence[PromptRow]

    def __init__(self, settings: Settings, device: str) -> None: ...

    def check(self, asked: Sequence[SampleRequest]) -> None:
        """Refuse what cannot be measured, before anything is drawn."""

    def measure(
        self,
        asked: Sequence[SampleRequest],
        before: list[Path],
        after: list[Path],
        erased: list[str],
    ) -> ProtocolResult:
        """Rows of pictures of the original and of the edited pipeline, a pair an ask."""

    def about(self) -> dict[str, Any]:
        """What measured."""


PROTOCOLS: dict[str, type[Published]] = {
    "objects": Objects,
    "nudity": Nudity,
    "styles": Styles,
    "retention": Retention,
}


def protocol(settings: Settings, device: str) -> dict[str, Any] | None:
    """Draw, measure, write and print the table; returns its line, or None while shards of other
    processes are still missing. UserError for what cannot be drawn or measured.
    """
    s, edits = settings, edits_of(settings)
    measuring = PROTOCOLS[s.protocol](s, device)
    lines = list(measuring.own)
    if s.prompts_file:
        lines = read_lines(Path(s.prompts_file), measuring.sentences)
    erased = erased_among(s, edits, lines) if measuring.sentences else []
    asked = asks(s, lines)
    measuring.check(asked)
    drawer = PairedSampler(s, device, edits)
    before, after = drawer.draw(asked, edited=False), drawer.draw(asked, edited=True)
    if missing := sum(not path.exists() for path in (*before, *after)):
        log(f"{missing} pictures are missing; the other SHARDS draw them, the last one measures")
        return None
    del drawer  # its memory is the measuring network's
    found = measuring.measure(asked, before, after, erased)
    return _write(s, found, asked, (before, after), (edits, measuring.about(), erased))


def erased_among(
    settings: Settings, edits: Sequence[Edit], lines: Sequence[PromptRow]
) -> list[str]:
    """Classes or artists of the prompts that CONCEPT names or, without it, the edits' prompts.

    UserError for a CONCEPT that the prompts do not ask for; an edit of something else keeps all.
    """
    known = list(dict.fromkeys(line.of for line in lines))
    given = [name for name in split_list(settings.concept) if name] if settings.concept else []
    words = given or [str(edit.about.get("prompt", "")) for edit in edits]

    def named(word: str) -> list[str]:
        return [k for k in known if word and (contains(word, k) or contains(k, word))]

    for name in given:
        if not named(name):
            some = ", ".join(known[:12])
            raise UserError(
                f"no prompt asks for CONCEPT={name}; set CONCEPT to one of {some}, or leave it out"
            )
    return list(dict.fromkeys(k for word in words for k in named(word)))


def _write(
    settings: Settings,
    found: ProtocolResult,
    asked: Sequence[SampleRequest],
    drawn: tuple[list[Path], list[Path]],
    made_by: tuple[list[Edit], dict[str, Any], list[str]],
) -> dict[str, Any]:
    """The results' folder: metrics.json, table.md, pictures.csv."""
    edits, measured, erased = made_by
    s = settings
    line = {"protocol": s.protocol, "erased": erased, "pictures": len(asked), **found.line}
    told = {
        **line,
        "rows": found.rows,
        "notes": found.notes,
        "measured_with": measured | {"versions": _versions()},
        "edits": [{"digest": e.digest(), **e.about} for e in edits],
    }
    made_from = [s.protocol, [p.name for p in drawn[1]], drawn[1][0].parent.name, measured, erased]
    with result_folder(s, "protocol", s.protocol, made_from) as folder:
        write_metrics(folder, "metrics", told, s)
        write_bytes(folder / "table.md", f"{found.markdown()}\n".encode())
        write_bytes(folder / "pictures.csv", _per_picture(found, asked, drawn))
    print(found.markdown())
    for note in found.notes:
        print(note)
    return line


def _per_picture(
    found: ProtocolResult, asked: Sequence[SampleRequest], drawn: tuple[list[Path], list[Path]]
) -> bytes:
    """A row a pair: prompt, seed, guidance, files below pictures/, and its numbers."""
    rows = []
    for i, (ask, *paths) in enumerate(zip(asked, *drawn, strict=True)):
        files = [f"{path.parent.name}/{path.name}" for path in paths]
        numbers = [values[i] for values in found.scores.values()]
        rows.append([ask.prompt, ask.of, ask.seed, ask.guidance, *files, *numbers])
    head = ["prompt", "of", "seed", "guidance", "original", "edited", *found.scores]
    return csv_bytes(head, rows)


def _versions() -> dict[str, str]:
    found = {}
    for name in MEASURING:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
