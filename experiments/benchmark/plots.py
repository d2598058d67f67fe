"""What tables share as pictures: matplotlib figures, drawn without a screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from concept_trak.registry import RANKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DPI = 4.2, 110  # of one panel
STRONG = {"concept_trak": "C3", "reference": "C1"}  # ours
NAMES = 1.5  # inches beside a panel for the names of its lines
KINDS = {  # of rankers, by what they know: the style of their lines
    "concept": {"color": "C0", "lw": 1.2},
    "whole picture": {"color": "0.35", "lw": 1},
    "control": {"color": "C2", "lw": 1, "ls": "--"},
}


def panels(titles: Sequence[str], height: float = INCHES) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a title, side by side."""
    from matplotlib.figure import Figure

    figure = Figure((INCHES * len(titles), height), dpi=DPI, layout="constrained")
    axes = [figure.add_subplot(1, len(titles), i + 1) for i in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure's file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def against_k(curves: Mapping[str, Mapping[str, np.ndarray]], what: str) -> Figure:
    """{title: {ranker, or "ranker, scope": `what` at 1, 2, ...}}, a panel a title. Each line has
    its name at its end; its colour is that of its kind.
    """
    from matplotlib.lines import Line2D

    figure, axes = panels(list(curves))
    figure.set_size_inches((INCHES + NAMES) * len(axes), 1.15 * INCHES)
    for axis, of_title in zip(axes, curves.values(), strict=True):
        lines_against_k(axis, of_title, what)
    handles = [Line2D([], [], label=kind, **style) for kind, style in KINDS.items()]
    style: dict[str, Any] = {"fontsize": 8, "frameon": False, "ncol": 3}
    figure.legend(handles=handles, loc="outside lower center", **style)
    return figure


def kind_of(ranker: str) -> str:
    """Which of KINDS a ranker is; a name that is not registered asks about a concept."""
    entry = RANKERS.get(ranker) if ranker in RANKERS.names() else None
    if getattr(entry, "control", ranker == "chance"):
        return "control"
    asks = entry is None or getattr(entry, "per_concept", False)
    return "concept" if asks else "whole picture"


def legend_below(figure: Figure) -> None:
    """One legend of all panels, under them, where it covers nothing."""
    axes = figure.axes
    handles = {
        label: line
        for a in axes
        for line, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    style: dict[str, Any] = {"fontsize": 7, "frameon": False, "ncol": 3 * len(axes)}
    figure.legend([*handles.values()], [*handles], loc="outside lower center", **style)


def lines_against_k(axis: Axes, curves: Mapping[str, np.ndarray], what: str) -> None:
    """One panel of `against_k`."""
    colors = {}
    for label, values in curves.items():
        name, *scope = label.split(", ")
        style: dict[str, Any] = dict(KINDS[kind_of(name)])
        if name in STRONG:
            style |= {"color": STRONG[name], "lw": 2.2, "zorder": 3}
        if scope:
            style["ls"] = ":"
        axis.plot(np.arange(1, len(values) + 1), values, **style)
        colors[label] = style["color"]
    axis.set_xlabel("k, pictures ranked highest")
    axis.set_ylabel(f"{what} at k")
    axis.set_ylim(0, 1.03)
    last = max(len(values) for values in curves.values())
    axis.set_xlim(1, last)
    axis.locator_params(axis="x", integer=True)
    ends = np.array([values[-1] for values in curves.values()])
    for place, (label, color), end in zip(spread_labels(ends), colors.items(), ends, strict=True):
        axis.annotate(
            label,
            (last, end),
            (1.06, place / 1.03),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def spread_labels(
    values: np.ndarray, gap: float = 0.037, low: float = 0, high: float = 1
) -> np.ndarray:
    """Places as near to `values` as names a `gap` apart can be, in the same order, between `low`
    and `high` as far as there is room.
    """
    from scipy.optimize import isotonic_regression

    order, places = np.argsort(values, kind="stable"), np.empty(len(values))
    steps = gap * np.arange(len(values))
    raised = isotonic_regression(values[order] - steps).x
    places[order] = np.clip(raised, low, max(low, high - gap * (len(values) - 1))) + steps
    return places
