"""Scores on the disk: safetensors of means and standard errors, JSON of everything beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from ..errors import UserError, call
from ..files import write_bytes, write_json
from ..reading import read_json, read_safetensors
from .roles import Component
from .scores import Scores

MEND = f"make the scores again, e.g. {call('cad/run_cad.sh', CONCEPT='cat')}"
TENSORS, FACTS = "scores.safetensors", "scores.json"


def save_scores(folder: Path, scores: Scores, among: list[Component]) -> None:
    """Write scores.safetensors (mean/{weight}, stderr/{weight} where there are several seeds) and
    scores.json.
    """
    tensors = {f"mean/{k}": v.contiguous() for k, v in scores.mean.items()}
    finite = {k: v for k, v in scores.stderr.items() if v.isfinite().all()}
    tensors |= {f"stderr/{k}": v.contiguous() for k, v in finite.items()}
    write_bytes(folder / TENSORS, save(tensors))
    facts = {"aim": scores.aim, "levels": scores.levels, "profile": scores.profile.tolist()}
    facts |= {"names": list(scores.names()), "layers": layers(scores, among)}
    write_json(folder / FACTS, facts | scores.about)


def load_scores(folder: str | Path) -> Scores:
    """Read what `save_scores` wrote. UserError for files that are missing, damaged or NaN."""
    folder = Path(folder)
    facts, tensors = read_json(folder / FACTS, MEND), read_safetensors(folder / TENSORS, MEND)
    try:
        mean = {n: tensors[f"mean/{n}"] for n in facts["names"]}
        unknown = {f"stderr/{n}": torch.full_like(v, torch.inf) for n, v in mean.items()}
        stderr = {n: (unknown | tensors)[f"stderr/{n}"] for n in mean}
        profile = np.array(facts["profile"], dtype=np.float64)
        found = Scores(facts["aim"], mean, stderr, facts["levels"], profile)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / FACTS} and {TENSORS} do not belong together; {MEND}") from None
    if bad := [name for name, value in mean.items() if not value.isfinite().all()]:
        raise UserError(f"{folder / TENSORS}: scores of {bad[0]} are NaN or infinite; {MEND}")
    return found


def layers(scores: Scores, among: list[Component]) -> list[dict[str, Any]]:
    """Statistics of each weight tensor, in the network's order.

    sum: of alpha, so that -sum is the predicted change of J without the whole tensor; positive,
    negative: its two parts; share: of all positive scores; sure: share of its scalars with |z| > 2.
    """
    total = sum(float(m.clamp_min(0).sum()) for m in scores.mean.values()) or 1.0
    found = []
    for c in among:
        alpha = scores.mean[c.name]
        positive = float(alpha.clamp_min(0).sum())
        found.append(
            {
                "name": c.name,
                "role": c.role,
                "weights": alpha.numel(),
                "sum": float(alpha.sum()),
                "positive": positive,
                "negative": float(alpha.clamp_max(0).sum()),
                "share": positive / total,
                "sure": float((scores.z(c.name).abs() > 2).float().mean()),
                "heads": [float(x) for x in c.grouped(alpha, "head").sum(1)] if c.heads else [],
            }
        )
    return found
