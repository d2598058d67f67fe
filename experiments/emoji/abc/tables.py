"""The table of the small AbC: recall of the exemplars among the train pictures.

Protocols: "published", exemplars captioned with their train prompt, which holds <new1>; "blind",
exemplars under the empty caption, so that only the picture can find them; "crowd", blind, with the
exemplars of all other tokens, equally uncaptioned, among the pictures that are ranked. A method
that finds what has no caption, rather than what was asked, fails the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from concept_trak.scoring import metrics
from concept_trak.scoring.ranking import ranking

from .scores import PROTOCOLS, AbcQueries, Scores


def figures(asked: AbcQueries, found: Scores) -> dict[str, dict[str, Any]]:
    """{protocol: figures} over the reported tasks, with the damping or step that
    `AbcQueries.choice` takes for that protocol.
    """
    told, report = {}, asked.split("report")
    for protocol, values in found.of.items():
        d = asked.choice(protocol, values)
        at, right = values[d, report], asked.relevant(protocol)[report]
        recall = metrics.recall_at_k(at, right)
        low, high = metrics.bootstrap_interval(recall)
        told[protocol] = {
            "recall_at_10": round(float(recall.mean()), 4),
            "ci95": [round(low, 4), round(high, 4)],
            "reverse_recall_at_10": round(float(metrics.least_k_recall(at, right).mean()), 4),
            "map": round(float(metrics.average_precision(at, right).mean()), 4),
            "hubs": round(hubness(at), 4),
            "recall_curve": metrics.recall_curve(at, right).round(3).tolist(),
            "chosen": found.choices[d] if found.choices else None,
            "per_query": [round(float(r), 4) for r in recall],
        }
    return told


def hubness(values: np.ndarray, k: int = 10) -> float:
    """Share of the top k of all rankings [Q, N] that the k pictures which are most often there
    take: 1 when every question has the same answer, whatever was asked.
    """
    _, often = np.unique(ranking(values)[:, :k], return_counts=True)
    return float(np.sort(often)[-k:].sum() / (len(values) * k))


def steps(told: dict[str, dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each step of the ablation adds to Recall@10 (published), with its interval over
    queries, paired.
    """
    values = [np.array(told[name]["published"]["per_query"]) for name in names]
    found = []
    for before, after in zip(values, values[1:], strict=False):
        low, high = metrics.bootstrap_interval(after - before)
        change = float((after - before).mean())
        found.append({"change": round(change, 4), "ci95": [round(low, 4), round(high, 4)]})
    return found


def chance(asked: AbcQueries) -> dict[str, float]:
    """Expected Recall@10 of a random order."""
    return {
        protocol: round(
            float(
                np.mean(
                    [
                        metrics.chance_recall_at_k(len(r), int(r.sum()))
                        for r in asked.relevant(protocol)
                    ]
                )
            ),
            4,
        )
        for protocol in PROTOCOLS
    }


def markdown(told: dict[str, dict[str, Any]], at_random: dict[str, float]) -> str:
    """One row a method: Recall@10 [95 %] (reverse recall, mAP, `hubness`) in each protocol."""
    lines = [f"| method | {' | '.join(PROTOCOLS)} |", "|---" * (1 + len(PROTOCOLS)) + "|"]
    for name, entries in told.items():
        row = []
        for e in (entries[protocol] for protocol in PROTOCOLS):
            low, high = e["ci95"]
            rest = f"reverse {e['reverse_recall_at_10']:.2f}, mAP {e['map']:.2f}"
            rest += f", hubs {e['hubs']:.2f}"
            row.append(f"{e['recall_at_10']:.3f} [{low:.2f}, {high:.2f}] ({rest})")
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines.append(f"| chance | {' | '.join(f'{at_random[p]:.3f}' for p in PROTOCOLS)} |")
    return "\n".join(lines)


def levels_markdown(levels: dict[str, dict[int, float]]) -> str:
    """A row a step of the ablation: `gradients.level_shares`, from the lowest noise level up."""
    lines = ["| train rows | share of the squared norm, by noise level |", "|---|---|"]
    for name, shares in levels.items():
        told = ", ".join(f"{level}: {share:.4f}" for level, share in sorted(shares.items()))
        lines.append(f"| {name} | {told} |")
    return "\n".join(lines)
