"""Measured cells on the disk: one JSON file a (target, edit), so that a run goes on where it ended.

A cell is known by everything that decides it: the model, the judge, the target, the edit's plan and
the numbers of pictures. A finished one is never made again; those of an earlier run are committed
as one file, `KEPT`, from which another machine goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.atomic_io import make_folder, write_bytes, write_json
from concept_trak.errors import UserError, git_restore_hint, remove_hint
from concept_trak.scoring.metrics import bootstrap_interval
from concept_trak.settings import ROOT, results_folder, short_hash
from concept_trak.validated_io import read_json, read_numbers

from .testbed import DRAW_STEPS, EraseSetup, Target

KEPT = ROOT / "experiments/cad/cells.json"  # {name: cell}, a line each


class MeasurementCache:
    """The folder of a bed; by default cad/cells in RESULTS_DIR, with the committed ones."""

    def __init__(self, setup: EraseSetup, folder: Path | None = None) -> None:
        self.setup = setup
        usual = results_folder(setup.task.settings, "cad/cells")
        self.folder = make_folder(folder or usual)
        committed = folder is None and KEPT.exists()
        self.kept = read_json(KEPT, git_restore_hint(KEPT)) if committed else {}
        self.origin = [setup.model.identity(), setup.task.data.content_hash(), DRAW_STEPS]
        self.origin += [setup.guidance, setup.num_seeds]

    def cell(self, target: Target, what: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured before, or what `make` measures now. what: of the target (JSON)."""
        name = f"{target.kind}-{target.name}".replace(" ", "_")
        name = f"{name}-{short_hash([*self.origin, name, what])}"
        if name in self.kept:
            return checked(self.kept, name, what, KEPT, git_restore_hint(KEPT))
        path = self.folder / f"{name}.json"
        if not path.exists():
            cell = json.loads(json.dumps(make() | {"what": what}))
            write_json(path, cell | {"digest": short_hash(cell)})
        return checked(
            {name: read_json(path, remove_hint(path))}, name, what, path, remove_hint(path)
        )

    def gather(self, path: Path) -> None:
        """Write all cells there are as one file, as `KEPT` is."""
        found = self.kept | {
            p.stem: read_json(p, remove_hint(p)) for p in self.folder.glob("*.json")
        }
        lines = (f"{json.dumps(k)}: {json.dumps(found[k], sort_keys=True)}" for k in sorted(found))
        body = ",\n".join(lines)
        write_bytes(path, f"{{\n{body}\n}}\n".encode())


HITS = ("shown", "beside", "object", "style")


def checked(cells: dict[str, Any], name: str, what: Any, path: Path, mend: str) -> dict[str, Any]:
    """The cell of that name. UserError for one of something else than `what`, one that is not what
    was written, and hits that are not 0 or 1 each.
    """
    cell = cells[name]
    if not isinstance(cell, dict) or cell.get("what") != json.loads(json.dumps(what)):
        raise UserError(f"{path}: {name} is a cell of something else; {mend}")
    cell = {key: value for key, value in cell.items() if key != "digest"}
    # the committed ones, and those that were written before digests were kept, have none
    if cells[name].get("digest", found := short_hash(cell)) != found:
        raise UserError(f"{path}: {name} is not what was written; {mend}")
    for key in HITS:
        if isinstance(cell.get(key, {}), dict):  # not measured, or by object
            continue
        if not np.isin(read_numbers(cell, key, (None,), path, mend), (0, 1)).all():
            raise UserError(f"{path}: {key} of {name} is not 0 and 1; {mend}")
    return cell


def mean_ci(hits: list[int] | np.ndarray) -> dict[str, Any]:
    """{"value", "ci95"}: a share with its bootstrap interval over pictures."""
    values = np.asarray(hits, dtype=np.float64)
    low, high = bootstrap_interval(values)
    return {"value": float(values.mean()), "ci95": [float(low), float(high)]}


def figures(target: Target, cell: dict[str, Any], bare: dict[str, Any]) -> dict[str, Any]:
    """UA, IRA and CRA of a cell beside the unedited model's cell of the same target."""
    other = "style" if target.kind == "object" else "object"
    ua = mean_ci(1 - np.asarray(cell["shown"]))
    found = {"ua": ua["value"], "ua_ci95": ua["ci95"]}
    for name, kind in (("ira", target.kind), ("cra", other)):
        n = len(cell[kind])
        after, before = np.asarray(cell[kind]), np.asarray(bare[kind])[:n]
        interval = mean_ci(after)["ci95"]
        share = 1 / max(before.mean(), 1e-9)
        found[name] = float(after.mean() * share)
        found[f"{name}_ci95"] = [float(end * share) for end in interval]
    return found | {"became": cell["became"], "pictures": [len(cell["shown"]), n]}
