"""What the tables of the small AbC say, as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmark.plots import against_k, panels
from experiments.overview import PAPER_ABLATION, STEPS

from .methods import ABLATION
from .scores import PROTOCOLS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recall_against_k(told: Mapping[str, Mapping[str, Any]]) -> Figure:
    """{method: figures of `tables.figures`}, a panel a protocol. The ablation has a picture of its
    own.
    """
    shown = {n: e for n, e in told.items() if n not in ABLATION}
    curves = {p: {n: np.array(e[p]["recall_curve"]) for n, e in shown.items()} for p in PROTOCOLS}
    return against_k(curves, "recall")


def ablation(values: list[float], steps: list[dict[str, Any]]) -> Figure:
    """The paper's five steps beside what it reports, and what each step changes."""
    figure, (ours, changes) = panels(["Recall@10, published protocol", "what a step changes"], 3)
    places = np.arange(len(STEPS))[::-1]
    ours.barh(places + 0.18, values, 0.34, color="C3", label="here")
    ours.barh(places - 0.18, PAPER_ABLATION, 0.34, color="0.7", label="the paper")
    ours.set_yticks(places, STEPS, fontsize=8)
    ours.legend(fontsize=7, frameon=False)
    change = np.array([step["change"] for step in steps])
    ends = np.array([step["ci95"] for step in steps]).T
    colors = ["C2" if value > 0 else "C3" for value in change]
    errors = np.abs(ends - change)
    changes.barh(places[1:], change, 0.6, xerr=errors, color=colors, error_kw={"lw": 0.8})
    changes.axvline(0, color="0.3", lw=0.8)
    changes.set_yticks(places[1:], STEPS[1:], fontsize=8)
    changes.set_xlabel("change of Recall@10, 95 % over queries")
    return figure
