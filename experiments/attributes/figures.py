"""What the tables of labelled pictures say, as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmark.plots import against_k, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"ood": "combinations never seen", "id": "combinations seen"}


def precision_against_k(curves: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """{split: {label: precision at 1, 2, ...}}."""
    return against_k({TITLES[split]: curves[split] for split in curves}, "precision")


def lds_bars(told: Mapping[str, Any], seconds: Mapping[str, float]) -> Figure:
    """LDS of every ranker, and the same against what a question costs."""
    names = [n for n, e in told.items() if isinstance(e, dict) and "lds" in e]
    names.sort(key=lambda n: told[n]["drawn"]["lds"])
    figure, (bars, cost) = panels(["over subsets", "against compute"], 1.4 + 0.28 * len(names))
    figures = {n: {"presence": told[n], "rate in drawings": told[n]["drawn"]} for n in names}
    for offset, key in ((0.18, "presence"), (-0.18, "rate in drawings")):
        values = np.array([figures[n][key]["lds"] for n in names])
        ends = np.array([figures[n][key]["ci95"] for n in names]).T
        places = np.arange(len(names)) + offset
        bars.barh(places, values, 0.34, xerr=np.abs(ends - values), error_kw={"lw": 0.8}, label=key)
    if told["ceiling_drawn"] is not None:
        bars.axvline(told["ceiling_drawn"], color="0.3", ls="--", lw=1, label="another seed, drawn")
    bars.set_yticks(range(len(names)), names, fontsize=7)
    bars.legend(fontsize=7, frameon=False)
    bars.set_xlabel("LDS")
    for place, name in enumerate(names):
        cost.scatter(
            max(seconds.get(name, 0), 1e-5),
            told[name]["drawn"]["lds"],
            s=14,
            color=f"C{place % 10}",
        )
        cost.annotate(
            name, (max(seconds.get(name, 0), 1e-5), told[name]["drawn"]["lds"]), fontsize=6
        )
    cost.set_xscale("log")
    cost.set_xlabel("seconds a question (kept rows cost nothing)")
    cost.set_ylabel("LDS, rate in drawings")
    return figure
