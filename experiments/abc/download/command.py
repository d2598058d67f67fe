"""`concept-trak download-abc` and `download-train-grad`: their flags.

Both can be called again at any time: finished parts are skipped, begun files are gone on with.
"""

from __future__ import annotations

import argparse
from typing import Any

from concept_trak.errors import UserError
from concept_trak.flags import place
from concept_trak.settings import ROOT

from .parts import PARTS, chosen_parts, download_parts
from .release import SETTINGS_NAME, SOURCE, Release, download_release

DATA_DIR, GRAD_ROOT = "data/abc", "experiments/abc/results/grads"


def add_parser(verbs: Any) -> None:
    """The two sub-commands. HF_TOKEN and HF_ENDPOINT are read from the environment only: flags show
    in the list of processes.
    """
    says = "Fetch and unpack the assets of the AbC benchmark."
    abc = verbs.add_parser("download-abc", help=says, description=says)
    says = f"folder to fetch into (default: {DATA_DIR})"
    folder = {"metavar": "FOLDER", "type": place}
    abc.add_argument("--data-dir", default=str(ROOT / DATA_DIR), help=says, **folder)
    abc.add_argument(
        "--parts",
        default="",
        metavar="NAMES",
        help=f"which, several with spaces ({', '.join(PARTS)}; default: all)",
    )
    abc.set_defaults(run=download_abc)

    says = "Fetch the released train gradients and make them a store."
    grad = verbs.add_parser("download-train-grad", help=says, description=says)
    optional(grad, "--hf-repo-id", SOURCE, f"repository on the hub (default: {SOURCE})")
    kinds = ("dataset", "model", "space")
    says = f"of that repository ({', '.join(kinds)}; default: dataset)"
    grad.add_argument("--repo-type", default="dataset", choices=kinds, metavar="KIND", help=says)
    says = f"folder below --grad-root (default: {SETTINGS_NAME})"
    optional(grad, "--train-grad-name", SETTINGS_NAME, says)
    says = "folder on the hub (default: the train grad name; . is the top)"
    grad.add_argument("--path-in-repo", default="", metavar="PATH", help=says)
    says = f"folder to fetch into (default: {GRAD_ROOT})"
    grad.add_argument("--grad-root", default=str(ROOT / GRAD_ROOT), help=says, **folder)
    grad.add_argument(
        "--count",
        type=int,
        default=16,
        metavar="N",
        help="of the release (shards; at least 1; default: 16)",
    )
    grad.add_argument(
        "--rows",
        type=int,
        default=6250,
        metavar="N",
        help="of each shard (rows; at least 1; default: 6250)",
    )
    says = "length of a row (float32 values; at least 1; default: 32768)"
    grad.add_argument("--dim", type=int, default=32768, metavar="N", help=says)
    grad.set_defaults(run=download_train_grad)
    says = "fetched at a time (files; at least 1; default: 8)"
    for verb in (abc, grad):
        verb.add_argument("--max-workers", type=int, default=8, metavar="N", help=says)


def optional(verb: argparse.ArgumentParser, flag: str, default: str, says: str) -> None:
    """A name whose empty value means the default, too."""
    verb.add_argument(
        flag, default=default, metavar="NAME", type=lambda given: given or default, help=says
    )


def download_abc(arguments: argparse.Namespace) -> None:
    """Bring the chosen parts to --data-dir, one after the other."""
    parts = chosen_parts(arguments.parts)
    refuse_below_one(arguments, "max_workers")
    download_parts(arguments.data_dir, parts, arguments.max_workers)


def download_train_grad(arguments: argparse.Namespace) -> None:
    """Bring the shards to --grad-root/--train-grad-name and write the manifest that makes them a
    store.
    """
    refuse_below_one(arguments, "max_workers", "count", "rows", "dim")
    given = vars(arguments)
    release = Release(**{name: given[name] for name in Release.__dataclass_fields__})
    download_release(release, arguments.max_workers)


def refuse_below_one(arguments: argparse.Namespace, *names: str) -> None:
    """UserError for the first of the named numbers that is not positive."""
    for name in names:
        if (given := getattr(arguments, name)) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{name.upper()}={given} is out of range; give {flag} at least 1")
