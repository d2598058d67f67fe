"""explorer.html: every answer there is on one self-contained page, to be filtered, sorted and
compared. It makes no request and needs no server.

Read are the answers' folders alone: question.json, scores.csv (names, captions, labels),
scores*.npy. Pictures stand in sheets of PER thumbnails, which the page decodes when they come into
sight; scores, float32 in base64, when they are asked for.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..atomic_io import make_folder, write_bytes
from ..datasets.image_folder import ImageCaptionDataset, looks
from ..datasets.labels import COLUMNS
from ..errors import UserError
from ..flags import command_line
from ..settings import ROOT, Settings
from .answers_index import changed_settings
from .formatting import damping_name
from .page import environment
from .pictures import QUERY_SIDE, data_uri, shrunk
from .saved_answer import OURS, PAGE, Kept, answers_in
from .sprites import SpriteSheets

EXPLORER = "explorer.html"


def answer_folders(settings: Settings) -> tuple[list[Path], Path]:
    """(folders of answers, where the page goes): RESULTS_DIR if it was set, else every
    experiment's.
    """
    experiments = ROOT / "experiments"
    usual = sorted(experiments.glob("*/results/qual/free_query"))
    own = Path(settings.results_dir) / "free_query"
    if own.resolve() in [folder.resolve() for folder in usual] or not own.is_dir():
        return usual, experiments / "explorer/results" / EXPLORER
    return [own], Path(settings.results_dir) / EXPLORER


def explore(settings: Settings) -> Path | None:
    """Write the page over all answers there are; returns its path. Each that cannot be shown is
    told and left out; None where all that there are were found by an index. UserError where there
    is none that can be shown.
    """
    folders, path = answer_folders(settings)
    found, wrong = answers_in(folders)
    for sentence in wrong:
        _leave_out(sentence)
    whole = [answer for answer in found if answer.asked["search"] != "index"]
    for answer in found:
        if answer not in whole:
            _leave_out(f"{answer.folder.name} knows its candidates' scores only; see its {PAGE}")
    if found and not whole:
        return None
    write_explorer(path, whole)
    return path


def _leave_out(sentence: str) -> None:
    print(f"left out: {sentence}")


def write_explorer(path: Path, answers: Sequence[Kept]) -> None:
    """The page of these answers, the first of them shown first. UserError where none can be."""
    make_folder(path.parent)
    data, blobs, sheets = collect(answers, path.parent)
    if not data["answers"]:
        ask = command_line("attribute", "emoji", {})
        raise UserError(f"there is no answer to explore yet; make one (about 10 s): {ask}")
    template = environment().get_template("explorer.html.jinja")
    html = template.render(data=_script_json(data), first=blobs[:1], rest=blobs[1:], sheets=sheets)
    write_bytes(path, html.encode())


def collect(
    answers: Sequence[Kept], place: Path
) -> tuple[dict[str, Any], list[tuple[str, str]], list[tuple[str, str]]]:
    """(what the page knows, (id, base64) of scores, (id, base64) of sheets). place: of the page."""
    galleries: dict[tuple[str | None, ...], _Gallery] = {}
    told, blobs, sheets = [], [], []
    for answer in answers:
        pictures = answer.asked["pictures"]
        known = tuple(pictures.get(name) for name in ("root", "digest", "looks"))
        try:
            rows = answer.rows(answer.concepts[0][2])
            concepts, scores = _concepts(answer, rows, f"s{len(told)}")
            about = _about(answer, place)
        except UserError as error:
            _leave_out(str(error))
            continue
        if known not in galleries:
            galleries[known] = _Gallery(*_pictures(pictures, rows), rows, len(galleries))
        about["dataset"] = galleries[known].number
        about["warnings"] = about["warnings"] + galleries[known].warnings
        told.append(about | {"concepts": concepts})
        blobs += scores
    shown = []
    for gallery in galleries.values():
        data, made = gallery.told(place)
        shown.append(data)
        sheets += made
    return {"answers": told, "datasets": shown}, blobs, sheets


@dataclass(frozen=True)
class _Gallery:
    """The pictures of some answers. rows: of a scores.csv. warnings: what must be said of them."""

    data: ImageCaptionDataset
    warnings: list[str]
    rows: list[dict[str, str]]
    number: int

    def told(self, place: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """(what the page knows of them, (id, base64) of their sheets)."""
        names = [row["file_name"] for row in self.rows]
        shown = [""] * len(names) if self.warnings else names
        thumbs = SpriteSheets(self.data.root, shown, place / ".sheets")
        about = {"side": thumbs.side, "across": thumbs.across, "number": self.number}
        sheets = [(f"p{self.number}-{i}", text) for i, text in enumerate(thumbs.encoded())]
        return _dataset(self.rows, self.data.root, place) | about, sheets


def _pictures(
    about: dict[str, Any], rows: list[dict[str, str]]
) -> tuple[ImageCaptionDataset, list[str]]:
    """(the pictures of an answer, what must be said of them): where they look otherwise than when
    they were scored, none is shown.
    """
    records = [{"file_name": row["file_name"]} for row in rows]
    data = ImageCaptionDataset(ROOT / about["root"], records, [row["caption"] for row in rows])
    try:
        if about.get("looks") in (None, looks(data)):
            return data, []
        reason = f"the pictures in {data.root} are not those that were scored"
    except UserError as error:
        reason = str(error).partition(";")[0]
    print(f"no pictures are shown: {reason}")
    return data, [f"no pictures are shown: {reason}"]


def _concepts(
    answer: Kept, rows: list[dict[str, str]], prefix: str
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """(what the page knows of an answer's concepts, (id, base64) of their scores)."""
    concepts, blobs = [], []
    for i, (target, minus, folder) in enumerate(answer.concepts):
        methods = {}
        for method in (OURS, *answer.asked["methods"]):
            values = answer.scores(folder, method, len(rows))
            methods[method] = {"id": f"{prefix}-{i}-{len(methods)}", "rows": len(values)}
            blobs.append((methods[method]["id"], _base64(values.tobytes())))
        relevant = _relevant(rows if i == 0 else answer.rows(folder))
        concepts.append(
            {"target": target, "minus": minus, "methods": methods, "relevant": relevant}
        )
    return concepts, blobs


def _about(answer: Kept, place: Path) -> dict[str, Any]:
    """What is said of an answer beside its scores."""
    asked, folder = answer.asked, answer.folder
    settings, unseen = asked["settings"], asked.get("unseen")
    made = datetime.fromtimestamp((folder / PAGE).stat().st_mtime)
    names = [damping_name(d) for d in asked["dampings"]]
    return {
        "id": folder.name.rsplit("-", 1)[-1],
        "prompt": asked["prompt"],
        "unseen": unseen if isinstance(unseen, bool) else None,
        "warnings": asked["warnings"],
        "seed": settings["seed"],
        "settings": changed_settings(settings),
        "page": _address(folder / PAGE, place),
        "query": data_uri(shrunk(answer.query(), QUERY_SIDE // 2)),
        "made": made.strftime("%Y-%m-%d %H:%M"),
        "dampings": names,
        "fixed": names.index(damping_name(settings["damping"])),
    }


def _address(path: Path, place: Path) -> str:
    """Of a file for a page in `place`, whatever bytes its name has."""
    return quote(os.fsencode(os.path.relpath(path, place)))


def _dataset(rows: list[dict[str, str]], root: Path, place: Path) -> dict[str, Any]:
    """Captions, files and labels of the pictures."""
    labels = {}
    for column in COLUMNS:
        if rows and column in rows[0]:
            values = list(dict.fromkeys(row[column] for row in rows))
            number = {value: i for i, value in enumerate(values)}
            labels[column] = {"values": values, "of": [number[row[column]] for row in rows]}
    return {
        "captions": [row["caption"] for row in rows],
        "files": [quote(row["file_name"]) for row in rows],
        "base": _address(root, place),
        "labels": labels,
        "fit": [float(row["fit"]) for row in rows] if rows and "fit" in rows[0] else None,
    }


def _relevant(rows: list[dict[str, str]]) -> list[int] | None:
    if not rows or "match" not in rows[0]:
        return None
    return [i for i, row in enumerate(rows) if row["match"] == "1"]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _script_json(value: Any) -> str:
    """JSON that no text can lead out of its script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escaped = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return escaped.encode(errors="replace").decode()
