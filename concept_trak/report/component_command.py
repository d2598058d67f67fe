"""`concept-trak cad`, `cad-erase`, `cad-amplify`, `cad-images`: the weights that carry a concept,
edits of them, and the training pictures that put it there.
"""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

from ..flags import add_setting_flags, settings_of
from ..settings import AMPLIFY

SAYS = {
    "cad": "Score which weights carry a concept.",
    "cad-erase": "Erase a concept from the weights; pictures before and after.",
    "cad-amplify": "Amplify a concept by removing the weights that work against it; without "
    "SELECTION and RATIO: {selection}, {ratio}.".format(**AMPLIFY),
    "cad-images": "Tell which training pictures put a concept into which weights.",
}
USES = (
    "components",
    "generation",
    "model",
    "data_dir",
    "batch_size",
    "results_dir",
    "prompt",
    "rows",
)


def add_parser(verbs: Any) -> None:
    """The four sub-commands, with the flags of `Settings`."""
    for verb, says in SAYS.items():
        sub = verbs.add_parser(verb, help=says, description=says)
        add_setting_flags(sub, (*USES, "target_concepts", "device", "gpu_id"))
        sub.set_defaults(run=functools.partial(run, verb), reads_edits=verb != "cad-images")


def run(verb: str, arguments: argparse.Namespace) -> None:
    """Run the verb; prints where the report is."""
    given = settings_of(arguments)
    from ..models.device import pick_device
    from .component_report import edit_weights, score_weights

    device = pick_device(given.device, given.gpu_id)
    given = given.on(device)
    if verb == "cad-images":
        from ..attribution.task import AttributionTask
        from .data_weight_influence import write_influence

        if arguments.granularity is None:  # the default of edits, single weights, is too fine
            given = given.but(granularity="module")
        print(
            f"images x weights: {os.path.relpath(write_influence(AttributionTask(given, device)))}"
        )
        return
    if verb == "cad-amplify" and arguments.selection is None and arguments.ratio is None:
        given = given.but(**AMPLIFY)
    if verb == "cad":
        folder = score_weights(given, device)
    else:
        folder = edit_weights(given, device, verb.removeprefix("cad-"))
    print(f"report: {os.path.relpath(folder / 'report.html')}")
