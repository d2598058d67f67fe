"""`concept-trak bench`: the engine against the reference recipe computed literally, as paired
ratios; or scoring from disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from concept_trak.errors import UserError
from concept_trak.flags import add_setting_flags, place, settings_of
from concept_trak.parsing import parse_memory
from concept_trak.settings import REFERENCE, as_dict, provenance, resolve

SCORING_SIZE = (20_000, 4096)  # N and k of the scoring comparison
# stages and fields of `Settings` that its help shows
ASKED = ("prompt", "target_concepts", "query_form", "seed", "query", "gen_num_inference_steps")
SCORED = ("num_queries", "max_memory")
USES = (*ASKED, "rows", "projection", *SCORED, "model", "data_dir", "batch_size", "device")


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """The sub-command `bench`: its own flags, and every flag of `Settings`."""
    what = "Compare speed and memory with the reference recipe done literally."
    add = (sub := verbs.add_parser("bench", help=what, description=what)).add_argument
    add(
        "--n",
        type=int,
        help="time scoring over N rows on disk, and nothing else (rows; at least 1; default: none)",
    )
    add(
        "--k",
        type=int,
        help=f"length of a synthetic row (features; at least 1; default: {SCORING_SIZE[1]})",
    )
    add(
        "--images",
        type=int,
        default=16,
        metavar="N",
        help="of a round (train pictures; at least 1; default: 16)",
    )
    add(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="after the warm-up (rounds; at least 1; default: 3)",
    )
    what = "folder for the synthetic rows, kept and reused (default: a temporary one)"
    add("--workdir", type=place, metavar="FOLDER", help=what)
    add_setting_flags(sub, USES)
    sub.set_defaults(run=bench)


def score(arguments: argparse.Namespace, num_queries: int) -> dict:
    """`bench_scoring` in this process, its rows in --workdir or in a temporary folder."""
    given = settings_of(arguments)
    memory = parse_memory(given.max_memory)
    from .scoring import Case, bench_scoring

    n, k = arguments.n or SCORING_SIZE[0], arguments.k or SCORING_SIZE[1]
    print(f"scoring {n} rows of {k}", flush=True)
    case = Case(n, k, given.num_queries or num_queries, memory)
    if arguments.workdir:
        return bench_scoring(case, Path(arguments.workdir) / f"n{n}-k{k}")
    with tempfile.TemporaryDirectory() as folder:
        return bench_scoring(case, Path(folder))


def bench(arguments: argparse.Namespace) -> None:
    """Run what the flags ask for; prints a table, then one JSON object as the last line.

    UserError for numbers below 1.
    """
    numbers = arguments.images, arguments.repeats, arguments.n, arguments.k
    if any(value is not None and value < 1 for value in numbers):
        raise UserError("--images, --repeats, --n and --k must be at least 1")
    if arguments.n:
        result = score(arguments, num_queries=2)
        print("\n".join(f"{name:32} {value}" for name, value in result.items()))
    else:
        result = compare(arguments)
        print(table(result))
    print(json.dumps(result | {"provenance": provenance()}))


def compare(arguments: argparse.Namespace) -> dict:
    """Every ratio, with what it was measured with."""
    import torch

    from .gradient_speed import bench_engine

    fields = as_dict(settings_of(arguments))
    given = {k: v for k, v in vars(arguments).items() if v is not None and k in fields}
    # a reference is not to be tuned
    fixed = {k: v for k, v in given.items() if k not in REFERENCE} | {"recipe": "reference"}
    settings = {
        "reference": resolve(arguments.benchmark, fixed),
        "default": resolve(arguments.benchmark, given | {"recipe": "default"}),
    }
    scoring = score(arguments, num_queries=1)  # first: its peak is this process's
    result = bench_engine(settings, arguments.images, arguments.repeats)
    result |= {"scoring_speedup": scoring["scoring_speedup"], "scoring": scoring}
    result["spread"]["scoring_speedup"] = scoring["scoring_speedup_spread"]
    result["peak_gib"]["scoring"] = scoring["peak_rss_gib"]
    return result | {
        "images": arguments.images,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
        "settings": {recipe: as_dict(s) for recipe, s in settings.items()},
    }


def table(result: dict) -> str:
    """Two small tables: ratios with their range over rounds, seconds and peak memory of a case."""
    lines = [f"{'ratio':24} {'median':>8}   range"]
    for name, (low, high) in result["spread"].items():
        lines.append(f"{name:24} {result[name]:8.2f}   {low:.2f} to {high:.2f}")
    lines.append(f"{'reference_max_rel_error':24} {result['reference_max_rel_error']:8.1e}\n")
    lines.append(f"{'case':24} {'ms each':>8}   peak GiB   its own")
    for case, peak in result["peak_gib"].items():
        seconds, added = result["seconds_each"].get(case), result["added_gib"].get(case)
        each = "" if seconds is None else f"{1e3 * seconds:.1f}"
        own = "" if added is None else f"{added:10.2f}"
        lines.append(f"{case:24} {each:>8}   {peak:8.2f}{own}")
    return "\n".join(lines) + "\n"
