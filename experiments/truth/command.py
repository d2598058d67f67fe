"""`concept-trak truth --test lies|hidden|counterfactual|lds`: rankings held against retraining.

By default the tables are made anew from the committed presences and from scores computed now on the
committed small models; RETRAIN=1 first trains what has no presences yet. The last line of output is
one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from concept_trak.flags import add_setting_flags, settings_of

TESTS = ("lies", "hidden", "counterfactual", "lds")
# stages and fields of `Settings` that its help shows
USES = ("truth", "methods", "rows", "projection", "query", "query_form", "scoring", "batch_size")


def add_parser(verbs: Any) -> None:
    """The sub-command `truth`: which test, and the flags of `Settings`."""
    says = "Hold rankings against what training a small model without pictures really does."
    sub = verbs.add_parser("truth", help=says, description=says)
    sub.add_argument(
        "--test",
        choices=TESTS,
        required=True,
        metavar="NAME",
        help=f"which ({', '.join(TESTS)}; required)",
    )
    add_setting_flags(sub, (*USES, "device", "gpu_id"))
    sub.set_defaults(run=run, needs_all_scores=True)


def run(arguments: argparse.Namespace) -> None:
    """Run the test on the emoji data and their small models."""
    given = settings_of(arguments)
    from concept_trak.attribution.task import AttributionTask
    from concept_trak.models.device import pick_device

    device, work = pick_device(given.device, given.gpu_id), Path(given.truth_dir)
    # rows and tables of small models, apart from all others
    places = {"grad_dir": str(work / "grads"), "results_dir": str(work)}
    task = AttributionTask(given.on(device).but(**places), device)
    test = importlib.import_module(f".tables.{arguments.test}", __package__)
    print(json.dumps(test.table(task)))
