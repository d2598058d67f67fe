"""`concept-trak bench-index`: the index on the embedded rows and on synthetic ones, which k ranks
as well, and what many pictures would take.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concept_trak.atomic_io import write_json
from concept_trak.errors import UserError, script_hint
from concept_trak.flags import add_setting_flags, place, settings_of
from concept_trak.settings import ROOT, Settings, provenance
from concept_trak.validated_io import read_json

if TYPE_CHECKING:
    from concept_trak.attribution.attributors import GradientAttributor

WORKDIR = ROOT / "experiments/scale/results/index"
PARTS = ("embedded", "synthetic", "codes", "widths", "paper")
PICTURES = 8  # of each split, of which the embedded queries are the concepts
SHARES = (1.0, 0.5)  # of one bit a value
ROW_BYTES = 8192 + 512 + 256  # about, of synthetic rows and codes, for the free disk


def add_parser(verbs: Any) -> None:
    """The sub-command `bench-index`: its own flags, and every flag of `Settings`."""
    what = "Measure the index: recall against a scan, bytes, build time, latency, peak memory."
    add = (sub := verbs.add_parser("bench-index", help=what, description=what)).add_argument
    add(
        "--rows",
        type=int,
        default=1_000_000,
        metavar="N",
        help="synthetic rows; 9 kB of disk each (rows; at least 2048; default: 1000000)",
    )
    add(
        "--workdir",
        type=place,
        default=str(WORKDIR),
        metavar="FOLDER",
        help="for synthetic rows and results, kept: a killed run goes on (default: of the scale "
        "experiment)",
    )
    add(
        "--parts",
        default=",".join(PARTS),
        help=f"which, of {', '.join(PARTS)}; codes and paper go by synthetic (default: all)",
    )
    add_setting_flags(sub, ("num_queries", "damping", "grad_dir", "model", "data_dir", "device"))
    sub.set_defaults(run=bench)


def bench(arguments: argparse.Namespace) -> None:
    """Run the parts; prints their tables, then one JSON object as the last line.

    UserError for parts that there are not, too few rows, a full disk, rows that are not there.
    """
    parts = [part for part in arguments.parts.split(",") if part]
    if wrong := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts={wrong[0]!r} is unknown; give --parts some of {', '.join(PARTS)}")
    if arguments.rows < 2048:
        raise UserError("--rows must be at least 2048")
    from concept_trak.index.faiss_import import faiss

    faiss()
    folder, settings = Path(arguments.workdir), settings_of(arguments)
    made = Bench(folder, settings, arguments.rows)
    for part in parts:
        print(f"\n## {part}\n", flush=True)
        getattr(made, part)()
    print(json.dumps(made.summary()))


class Bench:
    """The parts; each keeps its result as {part}.json in the folder."""

    def __init__(self, folder: Path, settings: Settings, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.settings = settings.but(num_queries=settings.num_queries or PICTURES)
        self._ranker: GradientAttributor | None = None

    def embedded(self) -> None:
        """The demo's rows, asked for concepts of real pictures."""
        from concept_trak.scoring.fisher import fisher_for
        from concept_trak.scoring.preconditioner import Budget

        from .index import IndexCase, bench_case, lines, truth

        ranker, asked, queries = self._asked()
        copy = self.folder / "embedded"
        shutil.rmtree(copy, ignore_errors=True)
        ignored = shutil.ignore_patterns("index", "gram-*")
        shutil.copytree(ranker.store.folder, copy, ignore=ignored)
        from concept_trak.store.store import Store

        widths = ranker.task.projection.widths

        def solve(store: Any, widths: Any, queries: Any, dampings: Any) -> np.ndarray:
            return fisher_for(widths, Budget(cache=False)).solve(store, queries, dampings)

        case = IndexCase("embedded", Store.open(copy), widths, queries, solve=solve)
        facts = bench_case(case, *truth(case))
        self._keep("embedded", facts)
        print(lines(facts))

    def synthetic(self) -> None:
        """Rows made of the demo's, asked for the same concepts."""
        from .index import IndexCase, bench_case, lines, spectra, truth

        store, widths, queries = self._synthetic_rows()
        told = spectra(store, self._made_ranker().store)
        whole = IndexCase("synthetic", store, widths, queries)
        solved, ends = truth(whole)
        for share in SHARES:
            case = replace(whole, name=f"synthetic, {share:g} bit a value", share=share)
            facts = bench_case(case, solved, ends)
            name = "synthetic" if share == 1 else f"synthetic-{share:g}"
            self._keep(name, facts | {"spectrum": told})
            print(f"{lines(facts)}\n", flush=True)
        print(told)

    def codes(self) -> None:
        """Other compressions, on the first synthetic rows."""
        from .index import solved_by_sample
        from .index_codecs import ROWS, compare, lines

        store, widths, queries = self._synthetic_rows()
        damping = self.settings.damping
        solved = solved_by_sample(store, widths, queries, [damping])[0]
        table = compare(store, widths, damping, solved)
        self._keep("codes", {"table": table, "damping": damping})
        print(lines(table, min(ROWS, store.num_rows)))

    def widths(self) -> None:
        """Recall against k on the embedded rows."""
        from experiments.benchmarks import Emoji

        from .projection_dims import lines, recall_by_width

        ranker, asked, _ = self._asked()
        task = ranker.task
        relevant = np.stack([Emoji(task).relevant(question) for question in asked])
        own = task.with_settings(self.settings.on(task.device).but(grad_dir=str(self.folder)))
        table = recall_by_width(own, asked, relevant, self._rows)
        damping = self.settings.damping
        self._keep("widths", {"table": table, "queries": len(asked), "damping": damping})
        print(f"{len(asked)} concepts of real pictures, damping {damping:g}\n\n{lines(table)}")

    def paper(self) -> None:
        """What 10^8 and 2 x 10^9 pictures take, by what was measured on synthetic rows."""
        from .capacity import Constants, table

        f = self._kept("synthetic")
        codes, rows = f["code_bytes"] * f["rows"], f["row_bytes"] * f["rows"]
        rerank = max(f["search_s"] - f["codes_s"], 0.0) / f["timed_at"]
        build = f["rows"] * f["dim"] / f["build_s"]
        rates = codes / f["codes_s"], rows / f["scan_s"], build
        print(
            f"Measured on one core with {f['rows']:,} rows of {f['dim']}: codes searched "
            f"{rates[0] / 1e9:.2f} GB/s, rows scanned {rates[1] / 1e9:.2f} GB/s, rows coded "
            f"{rates[2] / 1e6:.0f} million values/s, a candidate {1e6 * rerank:.0f} us."
        )
        print(table(Constants(*rates, rerank, f["dim"])))

    def summary(self) -> dict[str, Any]:
        """Recall@10 at the fixed damping with the candidates timed, bytes and speed; of the
        synthetic rows if they were measured, else of the embedded ones; and all that is known of
        them.
        """
        from .index import recall_of

        there = [p for p in ("synthetic", "embedded") if (self.folder / f"{p}.json").exists()]
        if not there:
            return {"recall_at_10": None, "bytes_ratio": None, "speedup": None}
        facts = self._kept(there[0])
        return {
            "recall_at_10": round(recall_of(facts)["recall_at_10"], 4),
            "bytes_ratio": round(facts["bytes_ratio"], 2),
            "speedup": round(facts["speedup"], 1),
            "measured": facts,
        }

    def _keep(self, part: str, found: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{part}.json", found | {"provenance": provenance()})

    def _kept(self, part: str) -> dict[str, Any]:
        mend = f"measure that part first: {script_hint('bench_index.sh --parts ' + part)}"
        return read_json(self.folder / f"{part}.json", mend)

    def _synthetic_rows(self) -> tuple[Any, tuple[int, ...], np.ndarray]:
        """(their store, made where it is not yet, widths of blocks, queries [Q, k])."""
        from .index import synthetic_store

        ranker, _, queries = self._asked()
        widths, place = tuple(ranker.task.projection.widths), self.folder / f"rows-{self.rows}"
        _refuse_small_disk(self.folder, self.rows if not place.exists() else 0)
        return synthetic_store(place, ranker.store, widths, self.rows), widths, queries

    def _made_ranker(self) -> Any:
        from concept_trak.attribution.attributors import GradientAttributor
        from concept_trak.attribution.task import AttributionTask
        from concept_trak.attribution.train_grad import open_store
        from concept_trak.models.device import pick_device

        if self._ranker is None:
            device = pick_device(self.settings.device, self.settings.gpu_id)
            task = AttributionTask(self.settings.on(device), device)
            self._ranker = GradientAttributor(task, open_store(task))
        return self._ranker

    def _asked(self) -> tuple[Any, list[Any], np.ndarray]:
        """(ranker, questions, their rows [Q, k])."""
        from experiments.benchmarks import Emoji

        ranker = self._made_ranker()
        splits = Emoji(ranker.task).questions("real")
        asked = [question for split in Emoji.splits for question in splits[split]]
        return ranker, asked, self._rows(ranker, asked)

    def _rows(self, ranker: Any, asked: Sequence[Any]) -> np.ndarray:
        """[Q, k] rows of questions, kept by what they were made from."""
        from concept_trak.store.array_cache import cached

        identity = {"questions": [ranker.identity(question) for question in asked]}
        path = self.folder / f"queries-{ranker.task.projection.proj_dim}.npy"
        return cached(path, identity, lambda: ranker.rows(asked))


def _refuse_small_disk(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, ROW_BYTES * rows
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and {rows} rows take {needed / 1e9:.1f} GB: "
            f"free some, or {script_hint('bench_index.sh --rows 100000')}"
        )
