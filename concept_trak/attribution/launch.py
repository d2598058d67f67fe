"""Train gradients on several devices: one process a shard, placed by accelerate, as many at a time
as GPU_IDS names.

A shard is a process of its own so that one that dies takes nothing with it: the others go on, its
number is told, and running the same command again computes what is missing (the store resumes
inside a shard). The parent holds no model and only counts rows.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError
from ..parsing import parse_gpu_ids, parse_shards
from ..settings import ROOT, Settings
from ..store.shards import Store
from .train_grad import folder_name

POLL_SECONDS = 0.5


def command(settings: Settings, shard: int, gpu: str) -> list[str]:
    """The command of one shard's process. Every field is passed on, so that parent and child cannot
    differ.
    """
    place = ["--cpu"] if gpu == "cpu" else ["--gpu_ids", gpu]
    changes = {
        "shards": str(shard),
        "gpu_ids": "",
        "gpu_id": "",
        "device": "cpu" if gpu == "cpu" else "",
    }
    fields = dataclasses.asdict(dataclasses.replace(settings, **changes))
    flags = [
        f"--{name.replace('_', '-')}={int(v) if isinstance(v, bool) else v}"
        for name, v in fields.items()
    ]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *place,
        "-m",
        "concept_trak",
        "train-grad",
        *flags,
    ]


def rows_done(folder: Path, shards: list[int]) -> tuple[int, int] | None:
    """(rows on disk, rows in all) of these shards, None while the store is not there."""
    if not (folder / "manifest.json").exists():
        return None
    store = Store.read_manifest(folder)
    return sum(store.resume_row(s) - store.bounds[s] for s in shards), sum(
        store.bounds[s + 1] - store.bounds[s] for s in shards
    )


class Workers:
    """The processes that run at present: {slot: (shard, gpu, process, log)}, a slot being a place
    in GPU_IDS.
    """

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.logs, self.running = settings, folder / "logs", {}
        self.logs.mkdir(parents=True, exist_ok=True)

    def start(self, shard: int, gpu: str, slot: int) -> None:
        """Begin a shard; what its process says goes to its log."""
        log = self.logs / f"train_grad-{shard}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        with log.open("ab") as out:
            process = subprocess.Popen(
                command(self.settings, shard, gpu), stdout=out, stderr=out, env=environment
            )
        self.running[slot] = (shard, gpu, process, log)

    def ended(self) -> list[tuple[int, str, int, Path, int]]:
        """(shard, gpu, exit code, log, slot) of every process that has ended since."""
        over = [
            (slot, *entry) for slot, entry in self.running.items() if entry[2].poll() is not None
        ]
        for slot, *_ in over:
            del self.running[slot]
        return [
            (shard, gpu, process.returncode, log, slot) for slot, shard, gpu, process, log in over
        ]

    def stop(self) -> None:
        """End all; their rows up to here are kept."""
        for _, _, process, _ in self.running.values():
            process.terminate()
        for _, _, process, _ in self.running.values():
            process.wait()


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = [
        line.strip()
        for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it said nothing"])[-1]


def launch_shards(settings: Settings) -> None:
    """Compute the unfinished shards of SHARDS on the devices of GPU_IDS. UserError at the end if
    some died, naming them.
    """
    gpus = parse_gpu_ids(settings.gpu_ids)
    folder = Path(settings.grad_dir) / folder_name(settings)
    wanted = parse_shards(settings.shards, settings.num_split)
    finished = (
        Store.read_manifest(folder).finished
        if (folder / "manifest.json").exists()
        else lambda s: False
    )
    queue = [s for s in wanted if not finished(s)]
    print(
        f"{folder}: {len(queue)} of {len(wanted)} shards to compute on {', '.join(gpus)}; logs in "
        f"{folder / 'logs'}"
    )
    workers, free, dead = Workers(settings, folder), list(enumerate(gpus)), {}
    with tqdm(desc="train gradients, all shards", unit="image") as bar:
        try:
            while queue or workers.running:
                while queue and free:
                    slot, gpu = free.pop(0)
                    workers.start(queue.pop(0), gpu, slot)
                time.sleep(POLL_SECONDS)
                for shard, gpu, code, log, slot in workers.ended():
                    free.append((slot, gpu))
                    if code:
                        dead[shard] = code
                        tqdm.write(f"shard {shard} died on {gpu} (exit {code}): {last_line(log)}")
                show(bar, rows_done(folder, wanted))
        finally:
            workers.stop()
    if dead:
        again = "SHARDS=" + ",".join(map(str, sorted(dead)))
        raise UserError(
            f"{len(dead)} of {len(wanted)} shards died; their rows so far are kept: see "
            f"{folder / 'logs'}, then run again with {again}"
        )


def show(bar: tqdm, progress: tuple[int, int] | None) -> None:
    """Bring the bar to the rows on disk; rows found at the start do not count for the ETA."""
    if progress is None:
        return
    done, total = progress
    if bar.total is None:
        bar.reset(total)
        bar.initial = bar.n = done
    bar.update(done - bar.n)
