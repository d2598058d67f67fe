"""`concept-trak bench`: the engine against the reference recipe computed literally, as paired
ratios; or scoring from disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ...errors import UserError
from ...flags import add_setting_flags, settings_of
from ...parsing import parse_memory
from ...settings import DAMPINGS, REFERENCE, as_dict, provenance, resolve

SCORING_SIZE = (20_000, 4096)  # N and k of the scoring comparison


def add_parser(verbs) -> None:
    """The sub-command `bench`: its own flags, and every flag of `Settings`."""
    sub = verbs.add_parser(
        "bench", help="speed and memory against the reference recipe done literally"
    )
    sub.add_argument(
        "--n", type=int, help="time scoring from disk over N synthetic rows, and nothing else"
    )
    sub.add_argument(
        "--k", type=int, help=f"features of a synthetic row (default {SCORING_SIZE[1]})"
    )
    sub.add_argument("--images", type=int, default=16, help="train images a round (default 16)")
    sub.add_argument("--repeats", type=int, default=3, help="rounds after the warm-up (default 3)")
    sub.add_argument(
        "--workdir",
        help="folder for the synthetic rows, kept and reused (default: a temporary one)",
    )
    add_setting_flags(sub)
    sub.set_defaults(run=bench)


def bench_scores(n: int, k: int, num_queries: int, workdir: str | None, max_memory: int) -> dict:
    """`bench_scoring` in this process, its rows in `workdir` or in a temporary folder."""
    from .scoring import bench_scoring

    if workdir:
        return bench_scoring(n, k, DAMPINGS, num_queries, Path(workdir) / f"n{n}-k{k}", max_memory)
    with tempfile.TemporaryDirectory() as folder:
        return bench_scoring(n, k, DAMPINGS, num_queries, folder, max_memory)


def bench(arguments: argparse.Namespace) -> None:
    """Run what the flags ask for; prints a table, then one JSON object as the last line. UserError
    for numbers below 1.
    """
    import torch

    from .engine import bench_engine

    given = settings_of(arguments)
    if any(
        value is not None and value < 1
        for value in (arguments.images, arguments.repeats, arguments.n, arguments.k)
    ):
        raise UserError("--images, --repeats, --n and --k must be at least 1")
    n, k = arguments.n or SCORING_SIZE[0], arguments.k or SCORING_SIZE[1]
    memory = parse_memory(given.max_memory)
    if arguments.n:
        result = bench_scores(n, k, given.num_queries or 2, arguments.workdir, memory)
        print("\n".join(f"{name:32} {value}" for name, value in result.items()))
        print(json.dumps(result | {"provenance": provenance()}))
        return
    set_by_user = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and name in as_dict(given)
    }
    own = {
        name: value for name, value in set_by_user.items() if name not in REFERENCE
    }  # a reference is not to be tuned
    settings = {
        "reference": resolve(arguments.benchmark, own | {"recipe": "reference"}),
        "default": resolve(arguments.benchmark, set_by_user | {"recipe": "default"}),
    }
    print(f"scoring {n} rows of {k}", flush=True)
    scoring = bench_scores(
        n, k, given.num_queries or 1, arguments.workdir, memory
    )  # first: its peak is this process's
    result = bench_engine(settings, arguments.images, arguments.repeats) | {
        "scoring_speedup": scoring["scoring_speedup"],
        "scoring": scoring,
    }
    result["spread"]["scoring_speedup"] = scoring["scoring_speedup_spread"]
    result["peak_gib"]["scoring"] = scoring["peak_rss_gib"]
    print(table(result))
    recorded = {
        "images": arguments.images,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
    }
    print(
        json.dumps(
            result
            | recorded
            | {"settings": {r: as_dict(s) for r, s in settings.items()}, "provenance": provenance()}
        )
    )


def table(result: dict) -> str:
    """Two small tables: ratios with their range over rounds, and seconds and peak memory of every
    case.
    """
    lines = [f"{'ratio':24} {'median':>8}   range"]
    for name in (
        "reference_speedup",
        "default_speedup",
        "query_speedup",
        "default_query_speedup",
        "scoring_speedup",
    ):
        lines.append(
            "{:24} {:8.2f}   {:.2f} to {:.2f}".format(name, result[name], *result["spread"][name])
        )
    lines.append(f"{'reference_max_rel_error':24} {result['reference_max_rel_error']:8.1e}\n")
    lines.append(f"{'case':24} {'ms each':>8}   peak GiB   its own")
    for case, peak in result["peak_gib"].items():
        seconds = result["seconds_each"].get(case)
        added = "" if case not in result["added_gib"] else f"{result['added_gib'][case]:10.2f}"
        lines.append(
            f"{case:24} {'' if seconds is None else format(1e3 * seconds, '.1f'):>8}   "
            f"{peak:8.2f}{added}"
        )
    return "\n".join(lines) + "\n"
