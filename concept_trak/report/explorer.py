"""explorer.html: every answer there is on one self-contained page, to be filtered, sorted and
compared. It makes no request and needs no server.

Read are the answers' folders alone: question.json, scores.csv (names, captions, labels),
scores*.npy. Pictures stand in sheets of PER thumbnails, which the page decodes when they come into
sight; scores, float32 in base64, when they are asked for.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..datasets.emoji import COLUMNS
from ..datasets.picture import read_picture
from ..errors import UserError
from ..files import make_folder, write_bytes
from ..flags import line_of
from ..reading import read_json, read_npy, read_text
from ..settings import ROOT, Settings
from .formats import damping_name
from .index import PAGE, QUESTION, changed_settings
from .page import environment
from .pictures import QUERY_SIDE, data_uri, shrunk
from .scores import CSV, NPY, npy_of
from .sheets import Sheets

EXPLORER = "explorer.html"
OURS = "concept_trak"
MEND = f"ask it again, e.g. {line_of('attribute', 'emoji', {})}"


@dataclass(frozen=True)
class Found:
    """An answer on disk. asked: its question.json."""

    folder: Path
    asked: dict[str, Any]

    @property
    def concepts(self) -> list[tuple[str, str, Path]]:
        """(target, c-, folder) of each concept."""
        a = self.asked
        names = zip(a["targets"], a["negatives"], a["folders"], strict=True)
        return [(target, minus, self.folder / name) for target, minus, name in names]


def answers_in(folders: Iterable[Path]) -> tuple[list[Found], int]:
    """(the answers of these folders, the newest first, how many cannot be read): made by an earlier
    version, or damaged. Answers by an index do not know all scores and are passed over with a word.
    """
    found, unreadable = [], 0
    pages = [page for folder in folders for page in folder.glob(f"*/{PAGE}")]
    pages = [page for page in pages if not page.parent.is_symlink()]
    for page in sorted(pages, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            asked = read_json(page.parent / QUESTION, MEND)
            answer = Found(page.parent, asked)
            if asked.get("search") == "index":
                print(f"{page.parent.name} knows its candidates' scores only: left out; see {page}")
                continue
            if not all((folder / NPY).is_file() for _, _, folder in answer.concepts):
                raise UserError(f"{page.parent} has no {NPY}; {MEND}")
            found.append(answer)
        except (UserError, KeyError, ValueError):
            unreadable += 1
    return found, unreadable


def places(settings: Settings) -> tuple[list[Path], Path]:
    """(folders of answers, where the page goes): RESULTS_DIR if it was set, else every
    experiment's.
    """
    experiments = ROOT / "experiments"
    usual = sorted(experiments.glob("*/results/qual/free_query"))
    own = Path(settings.results_dir) / "free_query"
    if own.resolve() in [folder.resolve() for folder in usual] or not own.is_dir():
        return usual, experiments / "explorer/results" / EXPLORER
    return [own], Path(settings.results_dir) / EXPLORER


def explore(settings: Settings) -> Path:
    """Write the page over all answers there are; returns its path. UserError where there is none
    that can be shown.
    """
    folders, path = places(settings)
    found, unreadable = answers_in(folders)
    if unreadable:
        print(f"{unreadable} answers of an earlier version are left out; to see one, {MEND}")
    if not found:
        ask = line_of("attribute", "emoji", {})
        raise UserError(f"there is no answer to explore yet; make one (about 10 s): {ask}")
    write_explorer(path, found)
    return path


def write_explorer(path: Path, answers: Sequence[Found]) -> None:
    """The page of these answers, the first of them shown first."""
    make_folder(path.parent)
    data, blobs, sheets = gathered(answers, path.parent)
    template = environment().get_template("explorer.html.jinja")
    html = template.render(data=_script_json(data), first=blobs[:1], rest=blobs[1:], sheets=sheets)
    write_bytes(path, html.encode())


def gathered(
    answers: Sequence[Found], place: Path
) -> tuple[dict[str, Any], list[tuple[str, str]], list[tuple[str, str]]]:
    """(what the page knows, (id, base64) of scores, (id, base64) of sheets). place: of the page."""
    datasets: dict[str, dict[str, Any]] = {}
    told, blobs, sheets = [], [], []
    for number, answer in enumerate(answers):
        about = answer.asked["pictures"]
        rows = _rows(answer.concepts[0][2])
        if about["digest"] not in datasets:
            data = _dataset(rows, ROOT / about["root"], place)
            thumbs = Sheets(ROOT / about["root"], data.pop("names"), place / ".sheets")
            data |= {"side": thumbs.side, "across": thumbs.across, "number": len(datasets)}
            sheets += [(f"p{data['number']}-{i}", text) for i, text in enumerate(thumbs.encoded())]
            datasets[about["digest"]] = data
        concepts = []
        for i, (target, minus, folder) in enumerate(answer.concepts):
            methods = {}
            for method in (OURS, *answer.asked["methods"]):
                name = NPY if method == OURS else npy_of(method)
                values = read_npy(folder / name, MEND, 2)
                methods[method] = {"id": f"s{number}-{i}-{len(methods)}", "rows": len(values)}
                blobs.append((methods[method]["id"], _base64(values.astype("<f4").tobytes())))
            relevant = _relevant(rows if i == 0 else _rows(folder))
            concepts.append(
                {"target": target, "minus": minus, "methods": methods, "relevant": relevant}
            )
        told.append(
            _about(answer, place)
            | {"dataset": datasets[about["digest"]]["number"], "concepts": concepts}
        )
    return {"answers": told, "datasets": list(datasets.values())}, blobs, sheets


def _about(answer: Found, place: Path) -> dict[str, Any]:
    """What is said of an answer beside its scores."""
    asked, folder = answer.asked, answer.folder
    settings = asked["settings"]
    picture = read_picture(answer.concepts[0][2] / "query.png", MEND)
    query = data_uri(shrunk(picture, QUERY_SIDE // 2))
    made = datetime.fromtimestamp((folder / PAGE).stat().st_mtime)
    return {
        "id": folder.name.rsplit("-", 1)[-1],
        "prompt": asked["prompt"],
        "unseen": asked.get("unseen"),
        "warnings": asked.get("warnings", []),
        "seed": settings.get("seed", 0),
        "settings": changed_settings(settings),
        "page": quote(os.path.relpath(folder / PAGE, place)),
        "query": query,
        "made": made.strftime("%Y-%m-%d %H:%M"),
        "dampings": [damping_name(d) for d in asked["dampings"]],
        "fixed": [damping_name(d) for d in asked["dampings"]].index(
            damping_name(settings["damping"])
        ),
    }


def _rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a scores.csv, in the order of the store."""
    text = read_text(folder / CSV, MEND)
    rows = sorted(csv.DictReader(io.StringIO(text, newline="")), key=lambda r: int(r["index"]))
    return rows


def _dataset(rows: list[dict[str, str]], root: Path, place: Path) -> dict[str, Any]:
    """Captions, files and labels of the pictures."""
    labels = {}
    for column in COLUMNS:
        if rows and column in rows[0]:
            values = list(dict.fromkeys(row[column] for row in rows))
            number = {value: i for i, value in enumerate(values)}
            labels[column] = {"values": values, "of": [number[row[column]] for row in rows]}
    base = quote(os.path.relpath(root, place))
    return {
        "captions": [row["caption"] for row in rows],
        "names": [row["file_name"] for row in rows],
        "files": [quote(row["file_name"]) for row in rows],
        "base": base,
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
