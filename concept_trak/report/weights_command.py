"""`concept-trak cad`, `cad-erase` and `cad-amplify`: scores of a concept's weights, and edits."""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

from ..flags import add_setting_flags, settings_of

SAYS = {
    "cad": "Score which weights carry a concept.",
    "cad-erase": "Erase a concept from the weights; pictures before and after.",
    "cad-amplify": "Amplify a concept by removing the weights that work against it.",
}
USES = ("components", "generation", "model", "data_dir", "batch_size", "results_dir", "prompt")


def add_parser(verbs: Any) -> None:
    """The three sub-commands, with the flags of `Settings`."""
    for verb, says in SAYS.items():
        sub = verbs.add_parser(verb, help=says, description=says)
        add_setting_flags(sub, (*USES, "target_concepts", "device", "gpu_id"))
        sub.set_defaults(run=functools.partial(run, verb))


def run(verb: str, arguments: argparse.Namespace) -> None:
    """Run the verb; prints where the report is."""
    given = settings_of(arguments)
    from ..models.device import pick_device
    from .weights import edit_weights, score_weights

    device = pick_device(given.device, given.gpu_id)
    given = given.on(device)
    if verb == "cad":
        folder = score_weights(given, device)
    else:
        folder = edit_weights(given, device, verb.removeprefix("cad-"))
    print(f"report: {os.path.relpath(folder / 'report.html')}")
