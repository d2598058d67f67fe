"""`concept-trak bench-scoring`: the second query, many queries together, and bfloat16 rows.

Rows are the synthetic ones of `bench.scoring`. What does not depend on the query is made at the
first and kept beside them; every later call reads it again, as a process of its own would.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from concept_trak.errors import UserError
from concept_trak.flags import add_setting_flags, place, settings_of
from concept_trak.parsing import parse_memory
from concept_trak.settings import provenance, resolve

if TYPE_CHECKING:
    from concept_trak.store.store import Store

    from .timing import TimedFunction

LARGE, SMALL = (100_000, 32768), (20_000, 4096)  # N, k
TOGETHER, IN_ONE_PASS, ONE_BY_ONE = 64, 1000, 10  # queries
CHECKED = 2  # of many queries, whose residual is recomputed one by one at every damping
IMAGES, ROUNDS = 32, 3  # of the comparison of bfloat16 with float32


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """The sub-command `bench-scoring`: its own flags, and every flag of `Settings`."""
    what = "Time the second query, many queries together, and rows in bfloat16."
    add = (sub := verbs.add_parser("bench-scoring", help=what, description=what)).add_argument
    parts = ("large", "small", "bf16")
    add("--parts", default="large,small,bf16", help=f"of {', '.join(parts)} (default: all)")
    add("--n", type=int, help=f"rows of the large store (at least 128; default: {LARGE[0]})")
    add("--k", type=int, help=f"length of its rows (features; at least 8; default: {LARGE[1]})")
    what = "folder for the synthetic rows, kept and reused (default: a temporary one)"
    add("--workdir", type=place, metavar="FOLDER", help=what)
    add_setting_flags(sub, ("max_memory",))
    sub.set_defaults(run=bench)


def bench(arguments: argparse.Namespace) -> None:
    """Print every measurement, then one JSON object as the last line. UserError for an unknown
    part, numbers that are too small, a disk that is full.
    """
    memory = parse_memory(settings_of(arguments).max_memory)
    n, k = arguments.n or LARGE[0], arguments.k or LARGE[1]
    asked = arguments.parts.split(",")
    if unknown := sorted({*asked} - {"large", "small", "bf16"}):
        raise UserError(f"--parts has no {unknown[0]!r}; give some of --parts large,small,bf16")
    if n < 128 or k < 8:
        raise UserError("the store is too small to time; give --n 128 and --k 8 at least")
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.workdir or temporary)
        if "large" in asked:
            found |= second_query(folder / f"n{n}-k{k}", n, k, memory)
        if "small" in asked:
            small = (min(n, SMALL[0]), min(k, SMALL[1]))
            found |= one_pass(folder / f"n{small[0]}-k{small[1]}", *small, memory)
    if "bf16" in asked:
        found |= bfloat16()
    print(json.dumps(found | {"max_memory": memory, "provenance": provenance()}))


def _queries(store: Store, count: int, seed: int) -> np.ndarray:
    """[count, k]: rows of the store and as much noise, so that each is of many directions."""
    rng = np.random.default_rng(seed)
    own = rng.choice(store.num_rows, count, replace=False)
    noise = rng.standard_normal((count, store.dim)) / store.dim**0.5
    return store.rows(own) + noise


def second_query(folder: Path, n: int, k: int, memory: int) -> dict:
    """Seconds of the first query (K included, unless it is there), of the second and of TOGETHER
    ones, with the method, the largest residual recomputed from the rows in float64 and peak memory.
    """
    import torch

    from concept_trak.scoring.fisher import FullFisher, choose_method
    from concept_trak.scoring.preconditioner import Budget
    from concept_trak.scoring.scores import scores
    from concept_trak.settings import DAMPINGS

    from .scoring import residual, synthetic_store
    from .timing import peak_rss_gib, restart_peak_rss, timed

    store = synthetic_store(folder, n, k, "float16")
    fisher, seconds, residuals = FullFisher(Budget(memory)), [], []
    restart_peak_rss()

    def ask(queries: np.ndarray) -> np.ndarray:
        solved = fisher.solve(store, queries, DAMPINGS)
        scores(store, solved, max_memory=memory)
        return solved

    for seed, count in enumerate((1, 1, TOGETHER)):
        queries = _queries(store, count, seed)
        took, solved = timed(partial(ask, queries))
        seconds.append(took)
        peak = peak_rss_gib()
        residuals.append(residual(store, queries[:CHECKED], solved[:, :CHECKED], DAMPINGS))
        print(f"{count} queries: {took:.1f} s, relative residual {residuals[-1]:.1e}", flush=True)
    return {
        "n": n,
        "k": k,
        "method": choose_method(store, 1, memory),
        "threads": torch.get_num_threads(),
        "first_query_s": seconds[0],
        "second_query_s": seconds[1],
        f"queries_{TOGETHER}_s": seconds[2],
        f"queries_{TOGETHER}_ratio": seconds[2] / seconds[1],
        "relative_residual": max(residuals),
        "peak_rss_gib": peak,
    }


def one_pass(folder: Path, n: int, k: int, memory: int) -> dict:
    """How much faster IN_ONE_PASS queries are than as many one by one (ONE_BY_ONE are timed), and
    the largest difference of their scores relative to the largest score.
    """
    from concept_trak.scoring.fisher import FullFisher
    from concept_trak.scoring.preconditioner import Budget
    from concept_trak.scoring.scores import precondition_and_score
    from concept_trak.settings import DAMPINGS

    from .scoring import synthetic_store
    from .timing import timed

    store = synthetic_store(folder, n, k, "float16")
    queries, fisher = _queries(store, min(IN_ONE_PASS, n // 2), 3), FullFisher(Budget(memory))
    precondition_and_score(store, queries[:1], DAMPINGS, fisher)  # makes what is kept
    alone, single = timed(
        lambda: [
            precondition_and_score(store, q[None], DAMPINGS, fisher) for q in queries[:ONE_BY_ONE]
        ]
    )
    together, whole = timed(lambda: precondition_and_score(store, queries, DAMPINGS, fisher))
    one = np.concatenate(single, 1)
    error = np.abs(whole[:, :ONE_BY_ONE] - one).max(2) / np.abs(one).max(2)
    each = alone / ONE_BY_ONE
    print(f"{len(queries)} queries in {together:.1f} s, alone {each:.2f} s each", flush=True)
    return {
        "small_n": n,
        "small_k": k,
        "alone_s": each,
        f"batch_{IN_ONE_PASS}_s": together,
        f"batch_{IN_ONE_PASS}_speedup": each * len(queries) / together,
        "batch_max_rel_error": float(error.max()),
    }


def bfloat16() -> dict:
    """Ratio of the seconds of IMAGES train rows in float32 and in bfloat16, in turn, and the
    smallest cosine between rows of one picture.
    """
    from .timing import ratio, time_in_turn

    dtypes = ("fp32", "bf16")
    cases = {dtype: partial(_rows_in, dtype) for dtype in dtypes}
    found = time_in_turn(cases, ROUNDS)
    speedup, spread = ratio(*([answer.seconds for answer in found[d]] for d in dtypes))
    one, other = (found[dtype][-1].result for dtype in dtypes)
    cosine = (one * other).sum(1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    return {
        "bf16_speedup": speedup,
        "bf16_speedup_spread": spread,
        "bf16_cosine": float(cosine.min()),
        "bf16_images": IMAGES,
    }


def _rows_in(dtype: str) -> TimedFunction:
    """Work of a case: train rows of the embedded model in a type."""
    from .gradient_speed import engine_rows, load_inputs

    return engine_rows(load_inputs(resolve("emoji", {"dtype": dtype}), IMAGES))
