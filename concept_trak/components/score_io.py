"""Scores on the disk: safetensors of means and standard errors, JSON of everything beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..atomic_io import sha256_file, write_bytes, write_json
from ..errors import UserError, script_hint
from ..validated_io import read_json, read_numbers, read_safetensors, refuse_misfits
from .objective import COMPONENT_OBJECTIVES
from .parameter_groups import Component
from .scores import Scores

MEND = f"make the scores again, e.g. {script_hint('cad/run_cad.sh', CONCEPT='cat')}"
TENSORS, FACTS = "scores.safetensors", "scores.json"


def save_scores(folder: Path, scores: Scores, among: list[Component]) -> None:
    """Write scores.safetensors (mean/{weight}, stderr/{weight} where there are several seeds) and
    scores.json.
    """
    tensors = {f"mean/{k}": v.contiguous() for k, v in scores.mean.items()}
    finite = {k: v for k, v in scores.stderr.items() if v.isfinite().all()}
    tensors |= {f"stderr/{k}": v.contiguous() for k, v in finite.items()}
    content = save(tensors)
    write_bytes(folder / TENSORS, content)
    facts = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "aim": scores.aim,
        "levels": scores.levels,
        "profile": scores.profile.tolist(),
    }
    facts |= {"names": list(scores.names()), "layers": layer_statistics(scores, among)}
    write_json(folder / FACTS, facts | scores.about)


def load_scores(folder: str | Path, among: Sequence[Component] = ()) -> Scores:
    """Read what `save_scores` wrote. UserError for files that are missing, damaged, not of one
    another or, where they are given, not of the components `among`.
    """
    path, facts_path = Path(folder) / TENSORS, Path(folder) / FACTS
    facts, tensors = read_json(facts_path, MEND), read_safetensors(path, MEND)
    names = facts.get("names")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not names:
        raise UserError(f"{facts_path}: 'names' is not a list of weights; {MEND}")
    if facts.get("aim") not in tuple(COMPONENT_OBJECTIVES):
        raise UserError(f"{facts_path}: 'aim' is none of {', '.join(COMPONENT_OBJECTIVES)}; {MEND}")
    mean = {n: tensors.get(f"mean/{n}", torch.zeros(0)).float() for n in names}
    wanted = {c.name: c.weight for c in among} or mean
    wanted = {f"mean/{n}": value for n, value in wanted.items()} | {
        f"stderr/{n}": value for n, value in mean.items() if f"stderr/{n}" in tensors
    }
    refuse_misfits(tensors, wanted, path, MEND)
    # those that were written before digests were kept have none
    found = sha256_file(path)
    if facts.get("sha256", found) != found or len(set(names)) < len(names):
        raise UserError(f"{facts_path} and {TENSORS} do not belong together; {MEND}")
    stderr = {n: tensors.get(f"stderr/{n}", torch.full_like(v, torch.inf)) for n, v in mean.items()}
    levels = read_numbers(facts, "levels", (None,), facts_path, MEND)
    profile = read_numbers(facts, "profile", (len(levels), len(names)), facts_path, MEND)
    return Scores(facts["aim"], mean, stderr, levels.astype(int).tolist(), profile.astype(float))


def layer_statistics(scores: Scores, among: list[Component]) -> list[dict[str, Any]]:
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
