"""`python -m concept_trak VERB`: every field of `Settings` is a flag (NUM_SPLIT -> --num-split);
one line for a user's mistake.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys

from .errors import UserError
from .flags import add_setting_flags, settings_of
from .settings import ROOT, Settings


class Parser(argparse.ArgumentParser):
    """A wrong flag is a user's mistake like any other: one line, without the usage."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def run_attribute(settings: Settings, device: str) -> None:
    from .attribution.attribute import attribute
    from .attribution.corpus import Corpus

    print(f"report: {os.path.relpath(attribute(Corpus(settings, device)))}")


def run_train_grad(settings: Settings, device: str) -> None:
    from .attribution.corpus import Corpus
    from .attribution.train_grad import train_grad

    store = train_grad(Corpus(settings, device))
    print(
        f"{os.path.relpath(store.folder)}: {store.num_rows} rows of {store.dim}, shards left: "
        f"{len(store.pending())}"
    )


def run_evaluate(settings: Settings, device: str) -> None:
    from .attribution.corpus import Corpus
    from .evaluation.evaluate import evaluate

    evaluate(Corpus(settings, device))


def run_train_model(settings: Settings, device: str) -> None:
    import torch

    from .datasets.folder import load_folder
    from .workshop.embedded.train import TrainSettings, train

    torch.set_flush_denormal(True)
    work = ROOT / "data/emoji/checkpoints"
    train(
        load_folder(settings.data_dir),
        ROOT / "data/emoji/checkpoints/pipeline",
        work,
        TrainSettings(),
    )
    print(
        f"pipeline: {os.path.relpath(work / 'pipeline')}; use it with SD_MODEL_PATH or move it to "
        "data/emoji/pipeline"
    )


def run_judge_model(settings: Settings, device: str) -> None:
    from .attribution.corpus import Corpus
    from .evaluation.model import measure_model

    measure_model(Corpus(settings, device))


def run_prepare(settings: Settings, device: str) -> None:
    from .datasets.prepare import prepare

    print(f"encoded: {os.path.relpath(prepare(settings, device))}")


def run_bench_sd14(settings: Settings, device: str) -> None:
    from .evaluation.bench.sd14 import bench_sd14

    bench_sd14(settings, device)


def run_task_grad(settings: Settings, device: str) -> None:
    from .evaluation.abc import run_rows

    run_rows(settings, device, "exemplar")


def run_test_grad(settings: Settings, device: str) -> None:
    from .evaluation.abc import run_rows

    run_rows(settings, device, "query")


def run_evaluate_tasks(settings: Settings, device: str) -> None:
    from .evaluation.abc import evaluate_tasks

    evaluate_tasks(settings, device)


def run_make_tasks(settings: Settings, device: str) -> None:
    from pathlib import Path

    from .datasets.abc import write_tasks

    print(
        f"{os.path.relpath(settings.task_json)}: "
        f"{write_tasks(Path(settings.data_dir), Path(settings.task_json))} tasks"
    )


def run_train_judge(settings: Settings, device: str) -> None:
    from .datasets.folder import load_folder
    from .models.text_to_image import load_pipeline
    from .workshop.judge.train import train_and_save

    model = load_pipeline(settings.sd_model_path, device, settings.dtype)
    train_and_save(
        load_folder(settings.data_dir), model, ROOT / "data/emoji/judge", seed=settings.seed
    )


VERBS = {
    "attribute": run_attribute,
    "train-grad": run_train_grad,
    "evaluate": run_evaluate,
    "train-model": run_train_model,
    "judge-model": run_judge_model,
    "train-judge": run_train_judge,
    "task-grad": run_task_grad,
    "test-grad": run_test_grad,
    "evaluate-tasks": run_evaluate_tasks,
    "make-tasks": run_make_tasks,
    "prepare": run_prepare,
    "bench-sd14": run_bench_sd14,
}
# Modules with an `add_parser(verbs)` that adds sub-commands and sets `run`, called with the
# arguments.
WITH_OWN_FLAGS = ("evaluation.bench.command", "workshop.tokens.command", "workshop.fetch.download")


def parser() -> argparse.ArgumentParser:
    """One sub-command a verb; flags without a default, so that only what the user set overrides the
    recipe.
    """
    top = Parser(prog="concept-trak", description="Concept attribution for diffusion models.")
    verbs = top.add_subparsers(dest="verb", required=True)
    for verb, run in VERBS.items():
        sub = verbs.add_parser(verb)
        add_setting_flags(sub)
        sub.set_defaults(run=functools.partial(run_with_settings, run))
    for module in WITH_OWN_FLAGS:
        importlib.import_module(f".{module}", __package__).add_parser(verbs)
    return top


def run_with_settings(run, arguments: argparse.Namespace) -> None:
    """Call `run` of VERBS with the settings and the device that the flags ask for."""
    settings = settings_of(arguments)
    if (
        settings.gpu_ids and run is run_train_grad
    ):  # the other verbs have no use for it; the processes pick their own devices
        from .attribution.launch import launch_shards

        return launch_shards(settings)
    from .models.device import pick_device

    device = pick_device(settings.device, settings.gpu_id)
    run(settings.on(device), device)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 2 with one line on standard error for a UserError."""
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
