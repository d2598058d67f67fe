"""What the tables of truth say, as pictures: matplotlib figures, drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmark.plots import legend_below, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .lds import Curve, Predicted

LOST = {
    "target_drop": "drop of presence, in units of its mean",
    "judge_drop": "drop of how often it is seen in drawings",
}
OURS, KNOWN = "concept_trak", "labels"  # drawn strongest; what knows the truth, dashed


def presence_against_removed(curves: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """{kind: {ranker: curve}}: how much of a concept is left when some of the pictures that a
    ranker puts on top were not learned. The lower a line falls, the more they had taught.
    """
    figure, axes = panels([f"{kind}s" for kind in curves])
    for axis, (kind, of_kind) in zip(axes, curves.items(), strict=True):
        for place, (name, curve) in enumerate(of_kind.items()):
            style = _style(name, place)
            axis.plot(curve.removed, curve.mean, label=name, **style)
            if name in (OURS, KNOWN):
                axis.fill_between(
                    curve.removed, curve.low, curve.high, alpha=0.15, color=style["color"], lw=0
                )
        axis.set_xlabel(f"how many of a ranker's top {curve.top} were not learned")
        axis.set_ylabel(f"presence of the {kind} (1: all learned)")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def predicted_against_measured(points: Mapping[str, Predicted]) -> Figure:
    """{ranker: its predictions of the objects}: a point is a concept in a subset's model."""
    titles = [f"{n}: Spearman {p.lds:.2f}, partial {p.partial:.2f}" for n, p in points.items()]
    figure, axes = panels(titles)
    for axis, p in zip(axes, points.values(), strict=True):
        axis.scatter(p.predicted, p.measured, s=9, alpha=0.4, lw=0, color="C0")
        _trend(axis, p.predicted, p.measured)
        axis.set_xlabel("predicted: summed scores of what is kept (z)")
        axis.set_ylabel("measured presence (z)")
    return figure


def drops(
    told: Mapping[str, Mapping[str, Any]], noise: Mapping[str, Any], of: str = "target_drop"
) -> Figure:
    """{kind: {arm: figures}} of `counterfactual.presence_drops`: what was lost without these
    pictures; of presence, or of what is drawn (of="judge_drop").
    """
    there = {kind: arms for kind, arms in told.items() if arms}
    tallest = max(len(arms) for arms in there.values())
    figure, axes = panels(list(there), 1.2 + 0.34 * tallest)
    for axis, (kind, arms) in zip(axes, there.items(), strict=True):
        names = sorted(arms, key=lambda name: arms[name][of])
        _bars(axis, names, arms, of, 0.18, "whose pictures were removed")
        if of == "target_drop":
            _bars(axis, names, arms, "untouched_drop", -0.18, "others")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(-0.6, tallest - 0.4)  # bars of one height in all panels
        axis.axvline(0, color="0.3", lw=0.8)
        if spread := (noise.get(kind) or {}).get(of):
            axis.axvspan(-spread, spread, color="0.85", zorder=0, label="between seeds")
        axis.set_xlabel(LOST[of])
    legend_below(figure)
    return figure


def _bars(
    axis: Axes, names: list[str], arms: Mapping[str, Any], which: str, offset: float, label: str
) -> None:
    shown = [(place, arms[name]) for place, name in enumerate(names) if which in arms[name]]
    if shown:
        values = np.array([told[which] for _, told in shown])
        ends = np.array([told[f"{which}_ci95"] for _, told in shown]).T
        axis.barh(
            [place + offset for place, _ in shown],
            values,
            0.34,
            xerr=np.abs(ends - values),
            error_kw={"lw": 0.8},
            label=label,
        )


def _trend(axis: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Means of y in tenths of x, as a line."""
    parts = np.array_split(np.argsort(x), 10)
    axis.plot([x[p].mean() for p in parts], [y[p].mean() for p in parts], color="C3", lw=2)


def _style(name: str, place: int) -> dict[str, Any]:
    if name == OURS:
        return {"color": "C3", "lw": 2.4, "zorder": 3}
    if name == KNOWN:
        return {"color": "0.1", "lw": 1.6, "ls": "--", "zorder": 2}
    return {"color": f"C{(place % 9 + 4) % 10}", "lw": 1}
