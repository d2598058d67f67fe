"""report.html: one self-contained page, no script and no request, that works from a file://
address. Its links lead to files beside it and to the pictures' own.

Every damping's cards, metrics and histogram stand in the page as panels of class `p{d}`; the
damping switch is a radio group and CSS hides the other panels. Pictures are embedded once, as SVG
symbols that the cards refer to. The same arguments give the same bytes. The markup stands in
`templates/`, where all text from outside is escaped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import atomic_io
from ..errors import UserError
from ..scoring.result import METRIC_K, ConceptResult
from .context import ReportContext
from .formatting import rate
from .histogram import BOX
from .pictures import PIXELATED_SIDE, QUERY_SIDE, data_uri, load_pictures, shrunk
from .view_model import column


@functools.cache
def environment() -> Environment:
    """The templates of this package; all they are given is escaped, and a misspelt name raises."""
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(rate=rate, data_uri=data_uri, thousands="{:,}".format)
    environment.globals.update(metric_k=METRIC_K, plot_box=BOX, pixelated_side=PIXELATED_SIDE)
    return environment


def pairs(record: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows, in the order given."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from pairs(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)


def _check(concepts: list[ConceptResult], shown: ReportContext) -> None:
    if not concepts:
        raise UserError("a report needs at least one target concept: set TARGET_CONCEPTS")
    for concept in concepts:
        shown.check(concept)
        if concept.dampings != concepts[0].dampings:
            raise UserError(
                f"{concept.target!r} and {concepts[0].target!r} have different dampings; give "
                "concepts of one sweep"
            )


def write_report(
    path: Path,
    prompt: str,
    concepts: list[ConceptResult],
    shown: ReportContext,
    *,
    unseen: bool | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page to `path` (its folder is made if missing).

    concepts: results over the same dampings, side by side; the fixed damping is shown first.
    unseen: True if the model was trained without this combination, False if with it, None if that
    is not known. warnings: said before the scores. Raises UserError where the arguments do not fit
    together.
    """
    _check(concepts, shown)
    fixed = concepts[0].damping_index(shown.fixed_damping)
    columns = [column(concept, shown) for concept in concepts]
    indices = [index for each in columns for index in each.indices]
    html = (
        environment()
        .get_template("page.html.jinja")
        .render(
            prompt=prompt,
            unseen=unseen,
            warnings=warnings,
            columns=columns,
            fixed=fixed,
            links=shown.links,
            weights=shown.weights,
            weights_line=shown.weights_line,
            operator=shown.settings.get("operator", "zero"),
            base_prompt=shown.settings.get("base_prompt", ""),
            num_images=concepts[0].num_images,
            query=shrunk(shown.picture.convert("RGB"), QUERY_SIDE),
            pictures=load_pictures(shown.dataset, indices),
            records={"Settings": pairs(shown.settings), "Provenance": pairs(shown.provenance)},
        )
    )
    path = Path(path)
    atomic_io.make_folder(path.parent)
    atomic_io.write_bytes(path, html.encode("utf-8"))
