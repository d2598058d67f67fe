"""`concept-trak bench-cluster`: its flags; see `cluster`."""

from __future__ import annotations

import argparse

from concept_trak.flags import add_setting_flags

USES = ("rows", "projection", "piece_rows", "batch_size", "num_split", "model", "data_dir")


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """The sub-command `bench-cluster`."""
    what = "Compare a Ray cluster on this machine with local runs, and simulate a large one."
    add = (sub := verbs.add_parser("bench-cluster", help=what, description=what)).add_argument
    add(
        "--bench-rows",
        type=int,
        default=256,
        metavar="N",
        help="made in a round by each (rows; at least 2; default: 256)",
    )
    add(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="rounds for each number of workers (at least 1; default: 3)",
    )
    add(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="simulations of each rate of failure (at least 1; default: 5)",
    )
    add_setting_flags(sub, USES)

    def run(arguments: argparse.Namespace) -> None:
        from .cluster import bench

        bench(arguments)

    sub.set_defaults(run=run)
