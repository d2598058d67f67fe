"""What tables share as pictures: matplotlib figures, drawn without a screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DPI = 4.2, 110  # of one panel
STRONG = {"concept_trak": "C3", "reference": "C1"}  # ours


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
    """{title: {ranker, or "ranker, scope": `what` at 1, 2, ...}}, a panel a title."""
    figure, axes = panels(list(curves))
    for axis, of_title in zip(axes, curves.values(), strict=True):
        lines_against_k(axis, of_title, what)
    legend_below(figure)
    return figure


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
    others = 0
    for label, values in curves.items():
        name, *scope = label.split(", ")
        style: dict[str, Any] = {"lw": 1, "ls": ":" if scope else "-"}
        if name in STRONG:
            style |= {"color": STRONG[name], "lw": 2.2}
        elif name == "chance":
            style |= {"color": "0.6", "ls": "--"}
        else:
            style |= {"color": f"C{(4 + others) % 10}", "ls": "-" if others < 10 else "-."}
            others += 1
        axis.plot(np.arange(1, len(values) + 1), values, label=label, **style)
    axis.set_xlabel("k, pictures ranked highest")
    axis.set_ylabel(f"{what} at k")
    axis.set_ylim(0, 1.03)
