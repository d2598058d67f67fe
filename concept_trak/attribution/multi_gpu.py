"""Train gradients on several devices: one process a shard, placed by accelerate, as many at a time
as GPU_IDS names.

A shard is a process of its own so that one that dies takes nothing with it: the others go on, its
number is told, and running the same command again computes what is missing (the store resumes
inside a shard). The parent holds no model and only counts rows; if it ends, however, they end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from .. import flags, isolated
from ..errors import UserError
from ..parsing import parse_gpu_ids, parse_shards
from ..process import WATCH_STDIN
from ..settings import Settings
from ..store.store import Store
from ..store.verify import pending_shards
from .executor import ThreadedExecutor
from .preflight import ROW_STAGES
from .task import AttributionTask
from .train_grad import create_store

PLAIN = Path(__file__).with_name("accelerate.yaml")  # in the place of the user's own configuration
ACCELERATE = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()


def command(settings: Settings, shard: int, gpu: str) -> list[str]:
    """The command of one shard's process.

    Every field is passed on, so that parent and child cannot differ.
    """
    place = ["--cpu"] if gpu == "cpu" else ["--config_file", str(PLAIN), "--gpu_ids", visible(gpu)]
    device = "cpu" if gpu == "cpu" else ""
    here = {"gpu_ids": "", "gpu_id": "", "device": device, "executor": "local"}
    here["methods"] = ""  # some are known to this process alone, and none makes rows
    child = settings.but(shards=str(shard), repair=False, **here)
    flags = [
        f"--{name.replace('_', '-')}={int(v) if isinstance(v, bool) else v}"
        for name, v in child.flat().items()
    ]
    launcher = isolated.command("accelerate.commands.launch", *ACCELERATE, *place, "--no_python")
    return [*launcher, *isolated.command("concept_trak", "train-grad", *flags)]


def visible(gpu: str) -> str:
    """CUDA_VISIBLE_DEVICES of a process that is to see one GPU alone, number `gpu` of those that
    this one sees: a number, or the UUID of a GPU or of a part of one (MIG). UserError for more.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return gpu
    names = [name.strip() for name in shown.split(",")]
    ends = (i for i, name in enumerate(names) if not name or name.startswith("-"))  # as CUDA does
    there = names[: next(ends, None)]
    if int(gpu) >= len(there):
        raise UserError(
            f"GPU_IDS names GPU {gpu}, but CUDA_VISIBLE_DEVICES={shown!r} shows {len(there)}, "
            "numbered from 0; mend GPU_IDS"
        )
    return there[int(gpu)]


def refuse_missing(gpu: str) -> None:
    """UserError for a GPU that is not there, or not visible."""
    if gpu == "cpu" or "MIG" in visible(gpu):  # of parts of a GPU a process counts but the first
        return
    if int(gpu) >= (count := torch.cuda.device_count()):
        raise UserError(
            f"GPU_IDS names GPU {gpu}, but {count} can be used here, numbered from 0; mend "
            "GPU_IDS, or set GPU_IDS=cpu"
        )


class ShardProcesses:
    """`compute(shard)` in a process of its own, at the first free of the places `gpus`."""

    def __init__(self, settings: Settings, logs: Path, gpus: list[str]) -> None:
        self.settings, self.logs = settings, logs
        self.places: queue.Queue[str] = queue.Queue()
        for gpu in gpus:
            self.places.put(gpu)
        self.running: set[subprocess.Popen] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def compute(self, shard: int) -> None:
        """Start the process and wait for it; what it says goes to its log. UserError if it dies."""
        gpu, log = self.places.get(), self.logs / f"train_grad-{shard}.log"
        own = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command(self.settings, shard, gpu),
                stdout=out,
                stderr=out,
                stdin=subprocess.PIPE,  # closed when this process ends, however it does
                env=own | {WATCH_STDIN: "1"},
                start_new_session=True,  # accelerate's own child is to be ended with it
            )
        self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        self.places.put(gpu)
        if code:
            raise UserError(f"shard {shard} died on {gpu} (exit {code}): {last_line(log)}")

    def stop(self) -> None:
        """End all; their rows up to here are kept."""
        for process in [*self.running]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in [*self.running]:
            process.wait()


def last_line(log: Path) -> str:
    """What a process said last, its error if it said one."""
    text = log.read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it said nothing"])[-1]


def launch_shards(settings: Settings) -> None:
    """Compute the unfinished shards of SHARDS on the devices of GPU_IDS.

    UserError at the end if some died, naming them.
    """
    gpus = parse_gpu_ids(settings.gpu_ids)
    if not gpus:
        raise UserError(
            "GPU_IDS names no device; set GPU_IDS to e.g. '0 1', or leave it out: unset GPU_IDS"
        )
    for gpu in gpus:
        refuse_missing(gpu)
    wanted = parse_shards(settings.shards, settings.num_split)
    print("loading the model once, to see what it needs", flush=True)
    store = Store.read_manifest(create_store_in_subprocess(settings, gpus[0]))
    folder, left = store.folder, pending_shards(store, wanted, settings.repair)
    where = f"on {', '.join(gpus)}; logs in {folder / 'logs'}"
    print(f"{folder}: {len(left)} of {len(wanted)} shards to compute {where}")
    processes = ShardProcesses(settings, folder / "logs", gpus)
    with tqdm(desc="train gradients, all shards", unit="image") as bar:
        executor = ThreadedExecutor(
            len(gpus),
            lambda: show(bar, *rows_done(store, wanted)),
            lambda shard, error: tqdm.write(str(error)),
        )
        try:
            executor.run(processes.compute, left)
        except UserError as error:
            kept = f"their rows so far are kept, see {folder / 'logs'}"
            line = flags.command("train-grad", settings, (*ROW_STAGES, "num_split", "gpu_ids"))
            raise UserError(f"{error} ({kept}): {line}") from None
        finally:
            processes.stop()


def create_store_in_subprocess(settings: Settings, gpu: str) -> Path:
    """The folder of the settings' store, made if it is not there, by a process that ends: this one
    holds no model. UserError as `create_store`.
    """
    on_device = settings.on("cpu" if gpu == "cpu" else f"cuda:{gpu}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_create, on_device).result()


def _create(settings: Settings) -> Path:
    return create_store(AttributionTask(settings, "cpu")).folder


def rows_done(store: Store, shards: list[int]) -> tuple[int, int]:
    """(rows on disk, rows in all) of these shards."""
    done = sum(store.resume_row(s) - store.bounds[s] for s in shards)
    return done, sum(map(store.count, shards))


def show(bar: tqdm, done: int, total: int) -> None:
    """Bring the bar to the rows on disk; rows found at the start do not count for the ETA."""
    if bar.total is None:
        bar.reset(total)
        bar.initial = bar.n = done
    bar.update(done - bar.n)
