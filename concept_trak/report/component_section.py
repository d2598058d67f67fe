"""The section "weights" of an answer: where concepts live, what the model draws without them.

For every target the scores and edits of `run_cad.sh`, `run_erase.sh` and `run_amplify.sh`, made by
the same code, into the same folders (`report.component_report`), at RATIO and a third of it (for
amplifying `settings.AMPLIFY` in place of the defaults). What is there is not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..attribution.prompts import split_list
from ..attribution.task import AttributionTask
from ..components.edits import load_edit
from ..components.score_io import layer_statistics, load_scores
from ..components.scores import Scores
from ..datasets.picture import read_picture
from ..errors import UserError, remove_hint
from ..process import log
from ..settings import AMPLIFY, Components
from .component_report import OF_TARGET, PICTURES, ComponentRun, write_edit, write_scores
from .context import ConceptWeights, SampleRow
from .pictures import EMBED_SIDE, shrunk

SHOWN_AIMS = ("erase", "amplify")
SAID = {"erase": "erased", "amplify": "amplified"}
SHARES = (1 / 3, 1)  # of RATIO
LAYERS = 8  # shown, those with most of the positive scores
OTHERS = 4  # pictures shown of other prompts


def of_concepts(task: AttributionTask) -> list[ConceptWeights]:
    """Of every target, in order. UserError as the edits raise it, naming the target."""
    s, found = task.settings, []
    weights = ComponentRun(s.but(weights=False), task.device)
    for target in split_list(s.target_concepts):
        log(f"the weights of {target!r} ...")
        try:
            found.append(_of_concept(weights.but(concept=target), target))
        except UserError as error:
            raise UserError(f"the weights of {target!r}: {error}") from None
    return found


def _of_concept(weights: ComponentRun, target: str) -> ConceptWeights:
    place = weights.place("scores")
    if not (place / "report.html").exists():
        write_scores(weights, weights.scores("erase"))
    rows = layer_statistics(load_scores(place, weights.among), weights.among)
    shown = [*range(OF_TARGET), *range(OF_TARGET, len(weights.prompts()))[:OTHERS]]
    return ConceptWeights(
        target,
        weights.words.prompt,
        sorted(rows, key=lambda row: -row["share"])[:LAYERS],
        heads_of(rows),
        place / "report.html",
        [weights.prompts()[i] for i in shown],
        list(_rows(weights, shown)),
        OF_TARGET,
    )


def heads_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{attention: [sum of alpha of each head over its q, k, v and out]}."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["heads"]:
            name = row["name"].partition(".to_")[0].replace("transformer_blocks.", "")
            before = found.get(name, [0.0] * len(row["heads"]))
            found[name] = [a + b for a, b in zip(before, row["heads"], strict=True)]
    return found


def _rows(weights: ComponentRun, shown: list[int]) -> Iterator[SampleRow]:
    """The unedited model's pictures, then those of each edit; an edit that is refused has none."""
    before, edits = None, []
    for aim in SHOWN_AIMS:
        scores: Scores | None = None
        edited = _for(weights, aim)
        for share in SHARES:
            at = edited.but(ratio=edited.settings.ratio * share)
            folder, name = at.place(aim), f"{SAID[aim]}, {100 * at.settings.ratio:.2g} %"
            try:
                if not (folder / PICTURES).exists():
                    before = before or weights.draw()
                    scores = scores or _scores(edited, aim)
                    write_edit(at, scores, before)
                    weights.edited.undo()
            except UserError as error:
                edits.append(SampleRow(name, f"no edit: {error}", [], {}))
                continue
            before = before or _cut(folder / PICTURES, 0, len(weights.prompts()))
            edits.append(_row(name, at, folder, shown))
    unedited = before or weights.draw()
    yield SampleRow("unedited", "", [shrunk(unedited[i], EMBED_SIDE) for i in shown], {})
    yield from edits


def _for(weights: ComponentRun, aim: str) -> ComponentRun:
    """For amplifying its own SELECTION and RATIO, where both are those of erasing by default."""
    s, usual = weights.settings, Components()
    chosen = (s.selection, s.ratio) != (usual.selection, usual.ratio)
    return weights if aim == "erase" or chosen else weights.but(**AMPLIFY)


def _scores(weights: ComponentRun, aim: str) -> Scores:
    """Those on the disk for erasing, which are to the bit what would be made again."""
    if aim != "erase":
        return weights.scores(aim)
    return replace(load_scores(weights.place("scores"), weights.among), about=weights.about())


def _row(name: str, weights: ComponentRun, folder: Path, shown: list[int]) -> SampleRow:
    edit = load_edit(folder / "edit.safetensors")
    note = f"{edit.count:,} of {sum(c.weight.numel() for c in weights.among):,} weights"
    pictures = _cut(folder / PICTURES, 1, len(weights.prompts()))
    links = {"page": folder / "report.html", "edit": folder / "edit.safetensors"}
    return SampleRow(name, note, [shrunk(pictures[i], EMBED_SIDE) for i in shown], links)


def _cut(path: Path, row: int, count: int) -> list[Image.Image]:
    """The pictures of one row of `weights.sheet`. UserError for a file that is none."""
    sheet = read_picture(path, remove_hint(path.parent))
    width, height = sheet.width // count, sheet.height // 2
    if (width * count, height * 2) != sheet.size:
        raise UserError(f"{path} is no sheet of {count} pictures; {remove_hint(path.parent)}")
    return [
        sheet.crop((i * width, row * height, (i + 1) * width, (row + 1) * height))
        for i in range(count)
    ]
