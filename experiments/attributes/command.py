"""`concept-trak labelled --benches synthetic`: from nothing to the table, stage by stage.

Each stage is there to be killed: what is finished is kept. The last line of output is one JSON
object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from concept_trak.errors import UserError
from concept_trak.flags import add_setting_flags, boolean, settings_of

from .settings import BENCHES, STAGES, TRUTHS, AttributeSettings, of_bench

if TYPE_CHECKING:
    from .pipeline import AttributeBenchmark

# stages and fields of `Settings` that its help shows
USES = ("truth", "methods", "rows", "projection", "query", "query_form", "scoring", "batch_size")
OWN = {
    "seeds": "of the trainings, e.g. 0-2",
    "reference_seeds": "of trainings that recipe reference is asked of, most of the cost",
    "networks": "trained and asked: unet, dit or both",
    "samples": "drawings of a combination that are asked about",
    "count": "train pictures; 0: all there are (celeba_hq)",
    "steps": "optimizer steps of a training",
    "size": "side of a picture in pixels",
    "shapes": "of synthetic pictures",
    "colors": "of synthetic pictures",
    "held_out": "combinations that are never trained on, e.g. 'triangle red|circle blue'",
    "attributes": "of faces; empty: all",
    "source": "folder of CelebAMask-HQ",
    "lds_subsets": "subsets of the LDS",
    "truth_steps": "optimizer steps of a training of --stage lds and counterfactual",
    "work": "a folder of it a bench, of pictures, models, scores; empty: the experiment's results",
}


def defaults_of(name: str) -> str:
    """ "default: 600; synthetic_4x4: 960": of the first bench, and of those that differ."""
    of = {bench: getattr(of_bench(bench, {}), name) for bench in BENCHES}
    first, *others = of
    told = [f"default: {'empty' if of[first] == '' else of[first]}"]
    return "; ".join(told + [f"{b}: {of[b]}" for b in others if of[b] != of[first]])


def add_parser(verbs: Any) -> None:
    """The sub-command `labelled`: which benches, which stage, and the flags of both settings."""
    says = "Tables of the paper on labelled pictures: synthetic shapes, drawn faces, CelebA-HQ."
    sub = verbs.add_parser("labelled", help=says, description=says)
    known = ", ".join(BENCHES)
    sub.add_argument(
        "--benches", required=True, metavar="NAMES", help=f"one after the other ({known}; required)"
    )
    stages = ("all", *STAGES, *TRUTHS)
    says = f"the last one to run; all: up to the table ({', '.join(stages)}; default: all)"
    sub.add_argument("--stage", choices=stages, default="all", metavar="NAME", help=says)
    sub.add_argument(
        "--quick",
        type=boolean,
        default=False,
        metavar="0|1",
        help="seconds, and no result (default: 0)",
    )
    types = {f.name: f.type for f in dataclasses.fields(AttributeSettings)}
    for name, told in OWN.items():
        kind = int if types[name] == "int" else str
        flag = f"--{name.replace('_', '-')}"
        shown = "TEXT" if kind is str else "N"
        sub.add_argument(
            flag, type=kind, default=None, metavar=shown, help=f"{told} ({defaults_of(name)})"
        )
    add_setting_flags(sub, (*USES, "device", "gpu_id"))
    sub.set_defaults(run=run, needs_all_scores=True)


def run(arguments: argparse.Namespace) -> None:
    """Every bench up to the stage asked for; the first one's result at the top, the others' under
    their names.
    """
    names = [name.strip() for name in arguments.benches.split(",") if name.strip()]
    benches = {name: bench_of(arguments, name) for name in names}
    if not benches:
        raise UserError(f"BENCHES is empty; set BENCHES to some of {', '.join(BENCHES)}")
    found = {name: result_of(bench, arguments.stage) for name, bench in benches.items()}
    first, *others = found
    print(json.dumps(found[first] | {name: found[name] for name in others}))


def bench_of(arguments: argparse.Namespace, name: str) -> AttributeBenchmark:
    """From the flags; nothing is computed yet."""
    given = {k: v for k in OWN if (v := getattr(arguments, k)) is not None}
    own = of_bench(name, given, arguments.quick)
    arguments.benchmark = name
    settings = settings_of(arguments)
    from concept_trak.models.device import pick_device

    from .pipeline import AttributeBenchmark

    device = pick_device(settings.device, settings.gpu_id)
    return AttributeBenchmark(own, settings.on(device), device)


def result_of(bench: AttributeBenchmark, stage: str) -> dict[str, Any]:
    """What the stage found; those before it run, or are found finished."""
    if stage in TRUTHS:
        from .table import truth_table

        bench.generate()
        return truth_table(bench, stage)
    last = STAGES.index("table" if stage == "all" else stage)
    found: dict[str, Any] = {}
    for name in STAGES[: last + 1]:
        found = run_stage(bench, name) or {}
    return found or {"stage": stage, "folder": str(bench.own.folder)}


def run_stage(bench: AttributeBenchmark, name: str) -> dict[str, Any] | None:
    """One stage; those that find something return it."""
    if name == "attribute":
        from .score_cache import attribute

        return {"found": sum(1 for _ in attribute(bench))}
    if name == "table":
        from .table import table_of

        return table_of(bench)
    return getattr(bench, name)()
