"""The verbs of the experiments, which `concept_trak.cli` adds to its own in a checkout."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from concept_trak.settings import JUDGE, ROOT, Settings
from concept_trak.verbs import MODEL, PLACE, ROWS, Verb, add_settings_verb


def run_evaluate(settings: Settings, device: str, benchmark: str = "emoji") -> None:
    """Evaluate every method on a benchmark."""
    from concept_trak.attribution.task import AttributionTask

    from .benchmark.evaluate import evaluate

    evaluate(AttributionTask(settings, device), benchmark)


def run_train_model(settings: Settings, device: str) -> None:
    """Train the embedded pipeline, beside the committed one."""
    import torch

    from concept_trak.datasets.image_folder import load_folder

    from .emoji.model.train import TrainSettings, train

    torch.set_flush_denormal(True)
    work = ROOT / "data/emoji/checkpoints"
    train(load_folder(settings.data_dir), work / "pipeline", work, TrainSettings())
    print(
        f"pipeline: {os.path.relpath(work / 'pipeline')}; use it with SD_MODEL_PATH or move it to "
        "data/emoji/pipeline"
    )


def run_judge_model(settings: Settings, device: str) -> None:
    """Measure the embedded model by its judge."""
    from concept_trak.attribution.task import AttributionTask

    from .emoji.model_quality import measure_model

    measure_model(AttributionTask(settings, device))


def run_bench_sd14(settings: Settings, device: str) -> None:
    """Time the architecture of SD v1.4."""
    from .scale.sd14 import bench_sd14

    bench_sd14(settings, device)


def run_task_grad(settings: Settings, device: str) -> None:
    """Rows of the exemplars of TASK_IDX."""
    from .abc.evaluate import run_rows

    run_rows(settings, device, "exemplar")


def run_test_grad(settings: Settings, device: str) -> None:
    """Rows of the queries of TASK_IDX."""
    from .abc.evaluate import run_rows

    run_rows(settings, device, "query")


def run_evaluate_tasks(settings: Settings, device: str) -> None:
    """Evaluate the tasks of TASK_IDX."""
    from .abc.evaluate import evaluate_tasks

    evaluate_tasks(settings, device)


def run_make_tasks(settings: Settings, device: str) -> None:
    """Write TASK_JSON; prints how many tasks."""
    from .abc.tasks import write_tasks

    made = write_tasks(Path(settings.data_dir), Path(settings.task_json))
    print(f"{os.path.relpath(settings.task_json)}: {made} tasks")


def run_train_judge(settings: Settings, device: str) -> None:
    """Train the judge and save it where it is committed."""
    from concept_trak.datasets.image_folder import load_folder
    from concept_trak.models.text_to_image import load_pipeline

    from .emoji.classifier.train import train_and_save

    model = load_pipeline(settings.sd_model_path, device, settings.dtype)
    data = load_folder(settings.data_dir)
    train_and_save(data, model, JUDGE, seed=settings.seed)


TASK_ROWS = ("tasks", "force_recompute_concept_grad", *ROWS)
PICTURES = ("negative_prompt", "gen_guidance_scale", "gen_num_inference_steps")
QUERIES = ("scope", "concept_guidance_scale", "eta", "epochs", "gen_num_inference_steps")
VERBS = {
    "evaluate": Verb(
        run_evaluate,
        "Attribute many queries with every method, and compare the top ten with the labels.",
        "--num-queries 16 --methods concept_trak,das",
        ("evaluation", "query_form", "generation", "max_memory", "store", "results_dir")
        + (*QUERIES, *ROWS),
        of_benchmark=True,
        needs_all_scores=True,
    ),
    "train-model": Verb(
        run_train_model, "Train the embedded model.", "--data-dir data/emoji", ("data_dir", *PLACE)
    ),
    "judge-model": Verb(
        run_judge_model,
        "Let the judge name what the embedded model draws.",
        "--num-queries 16",
        ("num_queries", "results_dir", *PICTURES, *MODEL),
    ),
    "train-judge": Verb(
        run_train_judge,
        "Train the judge of the embedded model.",
        "--seed 1",
        ("seed", "sd_model_path", "dtype", "data_dir", *PLACE),
    ),
    "task-grad": Verb(
        run_task_grad, "Compute the rows of AbC's exemplars.", "--task-idx 0-47", TASK_ROWS
    ),
    "test-grad": Verb(
        run_test_grad,
        "Compute the concept gradients of AbC's tasks.",
        "--task-idx 0-47",
        (*QUERIES, *TASK_ROWS),
    ),
    "evaluate-tasks": Verb(
        run_evaluate_tasks,
        "Find the exemplars of AbC's tasks among the training pictures.",
        "--task-idx 0-47",
        ("scoring", "report", "results_dir", *PICTURES, *QUERIES, *TASK_ROWS),
        needs_all_scores=True,
    ),
    "make-tasks": Verb(
        run_make_tasks,
        "List the tasks of AbC from its files.",
        "--task-json tasks.json",
        ("data_dir", "task_json"),
        needs_model=False,
    ),
    "bench-sd14": Verb(
        run_bench_sd14,
        "Time the engine on the architecture of Stable Diffusion, with random weights.",
        "--dtype fp32",
        ("layer", "proj_dim", "dtype", *PLACE),
    ),
}
# Modules with an `add_parser(verbs)`, which adds sub-commands that have flags of their own and sets
# `run`, called with the arguments.
COMMANDS = (
    *("scale.command", "scale.batched_queries", "scale.index_command", "scale.cluster_command"),
    *("scale.service_load", "truth.command", "attributes.command", "emoji.abc.command"),
    *("overview", "cad.command", "abc.train_tokens", "abc.download.command"),
)


def add_verbs(verbs: Any) -> None:
    """Every verb of the experiments."""
    for name, verb in VERBS.items():
        add_settings_verb(verbs, name, verb)
    for module in COMMANDS:
        importlib.import_module(f".{module}", __package__).add_parser(verbs)
