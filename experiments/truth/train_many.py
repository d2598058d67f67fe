"""Train and measure all models of a plan: a process each, one thread, as many at a time as there
are cores. What is finished is kept, what was killed goes on.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from concept_trak.atomic_io import make_folder
from concept_trak.errors import UserError
from concept_trak.process import log as say
from concept_trak.settings import JUDGE, provenance, short_hash
from concept_trak.validated_io import read_json

from .concept_likelihood import MeasureSettings, read_presences, write_presences
from .small_model import SmallSettings
from .subsets import RetrainingPlan, Subset, restore_hint


@dataclass(frozen=True)
class WorkerSpec:
    """What is done for one subset. make: trains and measures its model, called in a process of its
    own. a_process: models that a process makes before another takes its place, None: all of its
    models. model_gb: memory of
    one. checkpoint_mb: of one on the disk.
    """

    make: Callable[[Any, RetrainingPlan, Subset], None]
    a_process: int | None = 1
    model_gb: float = 1.2
    checkpoint_mb: float = 70


@dataclass(frozen=True)
class RetrainingSetup:
    """Where models come from and go to. like: folder of the pipeline whose parts are kept. data:
    folder of pictures and captions. work: TRUTH_DIR. kept: folder of the presences.
    """

    like: str
    data: str
    work: Path
    kept: Path
    settings: SmallSettings = SmallSettings()
    measure: MeasureSettings = MeasureSettings()

    def presences(self, plan: str, subset: Subset) -> Path:
        """File of one model's presences."""
        return self.kept / plan / f"{subset.name}.json"


def retrain(bench: Any, plan: RetrainingPlan, work: WorkerSpec | None = None) -> None:
    """Train and measure every subset that is not, with a bar over the steps of all models.

    bench: a `RetrainingSetup`, or what has its `presences`, `settings`, `measure` and `work` for
    other models; work: how one is trained and measured, by default `train_and_measure`.
    UserError at the end if some died, naming them; the others are finished.
    """
    todo = [s for s in plan.subsets if not is_measured(bench, plan.name, s)]
    known = hasattr(os, "sched_getaffinity")  # not everywhere
    there = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    cores = max(1, min(there, len(todo)))
    work = work or WorkerSpec(train_and_measure)
    disk = len(todo) * work.checkpoint_mb
    needs = f"{cores * work.model_gb:.1f} GB of memory, {disk:.0f} MB in {bench.work}"
    told = f"{len(todo)} of {len(plan.subsets)} models to train, {cores} at a time ({needs})"
    print(f"{plan.name}: {told}", flush=True)
    if not todo:
        return
    make_folder(bench.work)
    died: list[str] = []
    context = multiprocessing.get_context("spawn")
    with (
        _environment(OMP_NUM_THREADS="1", TQDM_DISABLE="1"),
        ProcessPoolExecutor(
            cores, context, end_with_parent, max_tasks_per_child=work.a_process
        ) as pool,
        _bar(todo, bench) as bar,
    ):
        running = {pool.submit(work.make, bench, plan, s): s.name for s in todo}
        try:
            _watch(running, bar, bench, todo, died)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if died:
        raise UserError(f"{len(died)} models died: {'; '.join(died)}; run the same again to go on")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that processes started inside the block inherit: two busy ones of two threads each
    would wait for one another, and the bar here is enough.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def end_with_parent() -> None:
    """In a process of the pool: end when the one that started it ends, even by SIGKILL."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _bar(todo: Sequence[Subset], bench: Any) -> tqdm:
    bar = tqdm(total=len(todo) * bench.settings.steps, desc="retraining", unit="step")
    bar.initial = bar.n = steps_done(todo, bench)  # does not count for the ETA
    return bar


def _watch(
    running: dict[Future[None], str], bar: tqdm, bench: Any, todo: Sequence[Subset], died: list[str]
) -> None:
    left = set(running)
    while left:
        done, left = wait(left, 10, FIRST_COMPLETED)
        died += [f"{running[f]} ({f.exception()})" for f in done if f.exception()]
        bar.update(max(0, steps_done(todo, bench) - bar.n))


def steps_done(subsets: Sequence[Subset], bench: Any) -> int:
    """Steps that the logs of these subsets tell of."""
    logs = (path for s in subsets for path in bench.work.glob(f"{s.name}-*/model.jsonl"))
    return sum(_last_step(path) for path in logs)


def _last_step(log: Path) -> int:
    lines = log.read_text(errors="replace").splitlines()
    try:
        return int(json.loads(lines[-1])["step"])
    except (IndexError, ValueError, KeyError, TypeError):
        return 0


def is_measured(bench: Any, plan: str, subset: Subset) -> bool:
    """Whether the presences of exactly this subset are there."""
    path = bench.presences(plan, subset)
    if not path.exists():
        return False
    known = read_json(path, restore_hint(path)).get("made_from")
    if not isinstance(known, dict):
        raise UserError(f"{path} holds no presences; {restore_hint(path)}")
    return known.get("subset") == subset_digest(subset) and known.get("bench") == setup_digest(
        bench
    )


def refuse_other_subset(bench: Any, plan: str, subset: Subset) -> None:
    """UserError for presences that are not of this subset, its seed among what it is."""
    if not is_measured(bench, plan, subset):
        path = bench.presences(plan, subset)
        raise UserError(
            f"{path} is of another subset or other settings than the plan's {subset.name} with "
            f"seed {subset.seed}; {restore_hint(path)}"
        )


def subset_digest(subset: Subset) -> str:
    """Of what a subset teaches, and its seed."""
    return short_hash(json.loads(json.dumps(asdict(subset))))


def setup_digest(bench: Any) -> str:
    """Of all settings of training and measuring."""
    return short_hash([asdict(bench.settings), asdict(bench.measure)])


def train_and_measure(bench: RetrainingSetup, plan: RetrainingPlan, subset: Subset) -> None:
    """One model from scratch to its presences, in this process, on one thread."""
    import torch

    from concept_trak.datasets.image_folder import load_folder
    from concept_trak.models.text_to_image import load_pipeline
    from experiments.emoji.classifier.io import load_judge

    from .concept_likelihood import measure_presences
    from .train import train_subset

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    like, data = load_pipeline(bench.like), load_folder(bench.data)
    train, held_out = data.split("train"), data.split("held_out")
    latents = like.encode_images(train.images(range(len(train)), like.image_size))
    begun = time.time()
    model = train_subset(like, train, latents, subset, bench.settings, bench.work)
    trained = time.time()
    found = measure_presences(model, held_out, load_judge(JUDGE), bench.measure)
    made_from: dict[str, Any] = {
        "subset": subset_digest(subset),
        "bench": setup_digest(bench),
        "data": train.content_hash(),
        "held_out": held_out.content_hash(),
        "weights": model.weight_hash(),
        "settings": asdict(bench.settings),
        "measure": asdict(bench.measure),
        "seconds": {"training": round(trained - begun), "measuring": round(time.time() - trained)},
        "provenance": provenance(),
    }
    write_presences(bench.presences(plan.name, subset), found, made_from)


def load_measurements(
    bench: Any, plan: RetrainingPlan, held_out: Any, read: Callable[..., Any] = read_presences
) -> dict[str, Any]:
    """{subset: presences} of all models of a plan. UserError for one that is missing, made from
    another subset, or of other pictures. Models that look like an accident are told of.
    """
    found = {}
    for subset in plan.subsets:
        path = bench.presences(plan.name, subset)
        found[subset.name] = read(path, held_out, plan.data)
        refuse_other_subset(bench, plan.name, subset)
    for name, rate, usual in failed_trainings({name: one.judged for name, one in found.items()}):
        say(
            f"{name} draws what is asked in {rate:.2f} of its pictures, models of the plan "
            f"{plan.name} in {usual:.2f}: its training may have failed; it counts all the same"
        )
    return found


def failed_trainings(
    judged: Mapping[str, Mapping[str, np.ndarray]],
) -> list[tuple[str, float, float]]:
    """(model, mean of the judge's probabilities, median of all models') where it is less than half:
    now and then a training of the same settings does not find the words. judged {model: {kind:
    [P]}}; nothing is an accident among fewer than three.
    """
    rates = {name: float(np.mean([v.mean() for v in of.values()])) for name, of in judged.items()}
    usual = float(np.median(list(rates.values()))) if len(rates) > 2 else 0.0
    return [(name, rate, usual) for name, rate in rates.items() if rate < usual / 2]
