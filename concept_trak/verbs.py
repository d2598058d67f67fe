"""The verbs of the library: what each runs, and the settings that bear on it."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .flags import add_setting_flags, place, settings_of
from .process import log
from .settings import COMPONENT_FIELDS, ROOT, Settings


def run_attribute(settings: Settings, device: str) -> None:
    """Answer PROMPT; prints where the report is."""
    from .attribution.task import AttributionTask
    from .report.write import attribute

    print(f"report: {os.path.relpath(attribute(AttributionTask(settings, device)))}")


def run_concepts(settings: Settings, device: str) -> None:
    """List what the data names."""
    from .attribution.preflight import train_split
    from .datasets.list_concepts import listing

    print(listing(train_split(settings.data_dir)))


def run_estimate(settings: Settings, device: str) -> None:
    """Say what run_own_data.sh will take."""
    from .attribution.preflight import estimate_own_data

    print(estimate_own_data(settings))


def run_explore(settings: Settings, device: str) -> None:
    """Make the page of all answers; prints where it is."""
    from .report.explorer import explore

    if path := explore(settings):
        print(f"explorer: {os.path.relpath(path)}")


def run_serve(settings: Settings, device: str) -> None:
    """Answer questions over HTTP; prints where."""
    from .service.server import serve

    serve(settings, device)


def run_suspects(settings: Settings, device: str) -> None:
    """List the training pictures whose caption does not fit; prints where the list is."""
    from .attribution.task import AttributionTask
    from .report.caption_mismatch import rank_mismatched_captions

    print(
        f"suspects: {os.path.relpath(rank_mismatched_captions(AttributionTask(settings, device)))}"
    )


def run_train_grad(settings: Settings, device: str) -> None:
    """Fill the store; prints its state."""
    from .attribution.task import AttributionTask
    from .attribution.train_grad import train_grad

    store = train_grad(AttributionTask(settings, device))
    print(
        f"{store.where}: {store.num_rows} rows of {store.dim}, shards left: {len(store.pending())}"
    )


def run_build_index(settings: Settings, device: str) -> None:
    """Make or update the index of the rows; prints where it is."""
    from .attribution.index_search import build_index
    from .attribution.task import AttributionTask

    print(f"index: {os.path.relpath(build_index(AttributionTask(settings, device)).folder)}")


def run_prepare(settings: Settings, device: str) -> None:
    """Encode SOURCE_DIR; prints where to."""
    from .datasets.prepare import prepare

    print(f"encoded: {os.path.relpath(prepare(settings, device))}")


def run_export(folder: str, kind: str, settings: Settings, device: str) -> None:
    """Export the finished store; prints where to."""
    from .attribution.task import AttributionTask
    from .attribution.train_grad import open_store
    from .store.export import export

    export(open_store(AttributionTask(settings, device)), Path(folder), kind)
    print(f"exported: {os.path.relpath(folder)}")


@dataclass(frozen=True)
class Verb:
    """A sub-command: what it runs, one sentence on it, its flags after the verb in an example.

    uses: stages and fields of `Settings` that bear on it; its help shows no others. check: a
    function of `attribution.preflight` that refuses what can be refused before anything is loaded.
    needs_model: it loads the model, and torch.
    of_benchmark: `run` is given the benchmark's name, too.
    needs_all_scores: it refuses SEARCH=index.
    """

    run: Callable[[Settings, str], None]
    help: str
    example: str
    uses: tuple[str, ...]
    check: str = ""
    needs_model: bool = True
    of_benchmark: bool = False
    needs_all_scores: bool = False


PLACE = ("device", "gpu_id")
MODEL = ("model", "data_dir", *PLACE)
CLUSTER = ("executor", "num_cpus", "num_gpus", "piece_rows", "task_retries")
ROWS = ("rows", "projection", "grad_dir", "store_cache", "store_dtype", "batch_size", "num_train")
ROWS += MODEL
VERBS = {
    "attribute": Verb(
        run_attribute,
        "Generate a picture, and rank the training pictures that taught the model each concept.",
        "--prompt 'an owl in the style of openmoji line' --target-concepts 'owl|openmoji line'",
        (
            *("question", "generation", "query", "scoring", "report", "methods", "results_dir"),
            *(*COMPONENT_FIELDS, *ROWS),
        ),
        check="check_question",
    ),
    "concepts": Verb(
        run_concepts,
        "List the concepts that the labels of the pictures name, or else the words of captions.",
        "--data-dir my_pictures",
        ("data_dir",),
        needs_model=False,
    ),
    "estimate": Verb(
        run_estimate,
        "Say what pictures of one's own will take, in time and disk; nothing is loaded or written.",
        "--benchmark own --source-dir data/emoji --sd-model-path data/emoji/pipeline"
        " --prompt 'a cat' --target-concepts cat",
        ("question", "source_dir", "nfe", "proj_dim", "store_dtype", "grad_dir", "sd_model_path"),
        needs_model=False,
    ),
    "explore": Verb(
        run_explore,
        "Make one page of all answers there are, to filter, sort and compare; needs no server.",
        "--results-dir experiments/emoji/results/qual",
        ("results_dir",),
        needs_model=False,
    ),
    "serve": Verb(
        run_serve,
        "Answer questions over HTTP, one model in memory, until SIGTERM or Ctrl-C.",
        "--listen-port 8080",
        ("service", "query_form", "generation", "query", "scoring", "report", "results_dir", *ROWS),
        check="check_rows",
    ),
    "train-grad": Verb(
        run_train_grad,
        "Compute the rows of the training pictures, and keep them; goes on where it stopped.",
        "--nfe 5 --shards 0-1",
        ("store", "gpu_ids", "max_memory", *CLUSTER, *ROWS),
        check="check_model",
    ),
    "build-index": Verb(
        run_build_index,
        "Make the index that SEARCH=index searches; goes on where it stopped, adds new shards.",
        "--candidates 2000",
        ("scoring", *ROWS),
        check="check_index",
    ),
    "suspects": Verb(
        run_suspects,
        "List the training pictures whose caption the model contradicts.",
        "--data-dir my_pictures",
        ("results_dir", *ROWS),
        check="check_rows",
    ),
    "prepare": Verb(
        run_prepare,
        "Encode a folder of pictures and captions once, for a model.",
        "--source-dir my_pictures --data-dir encoded",
        ("source_dir", "batch_size", *MODEL),
    ),
}


def add_settings_verb(verbs: Any, name: str, verb: Verb) -> None:
    """A sub-command whose flags are those of `Settings`."""
    sub = add_verb(verbs, name, verb.help, verb.example)
    add_setting_flags(sub, verb.uses)
    run = functools.partial(run_with_settings, verb.run, verb)
    sub.set_defaults(run=run, needs_all_scores=verb.needs_all_scores)


def add_verb(verbs: Any, name: str, says: str, example: str) -> Any:
    """A sub-command's `Parser`, without flags."""
    epilog = f"example:\n  concept-trak {name} {example}"
    return verbs.add_parser(name, help=says, description=says, epilog=epilog)


def add_export(verbs: Any) -> None:
    """The sub-command `export`, which has flags of its own."""
    says = "Write the finished rows as a file of numpy, or as a store of trak or dattri."
    sub = add_verb(verbs, "export", says, "--kind numpy --out-dir exported")
    kinds = ("numpy", "trak", "dattri")
    sub.add_argument("--kind", choices=kinds, default="numpy", help="layout (default: numpy)")
    add = sub.add_argument
    add("--out-dir", required=True, type=place, metavar="FOLDER", help="where to (required)")
    add_setting_flags(sub, ROWS)

    def run(arguments: argparse.Namespace) -> None:
        of_store = functools.partial(run_export, arguments.out_dir, arguments.kind)
        run_with_settings(of_store, None, arguments)

    sub.set_defaults(run=run)


def run_with_settings(
    run: Callable[[Settings, str], None], verb: Verb | None, arguments: argparse.Namespace
) -> None:
    """Call `run` of VERBS with the settings and the device that the flags ask for."""
    settings = settings_of(arguments)
    if run in (run_estimate, run_prepare, run_train_grad):
        settings = with_fitting_shards(settings, run is run_train_grad, arguments)
    if verb and not verb.needs_model:
        return run(settings, "cpu")
    if verb and verb.check:
        from .attribution import preflight

        getattr(preflight, verb.check)(settings)
    log(f"loading the model {settings.sd_model_path.removeprefix(f'{ROOT}/')} ...")
    # the other verbs have no use for GPU_IDS; the processes pick their own devices
    if run is run_train_grad and settings.executor == "ray":
        from .attribution.ray_cluster import launch_tasks

        return launch_tasks(settings)
    if run is run_train_grad and (settings.gpu_ids or settings.executor == "gpus"):
        from .attribution.multi_gpu import launch_shards

        return launch_shards(settings)
    from .models.device import pick_device

    device = pick_device(settings.device, settings.gpu_id)
    if verb and verb.of_benchmark:
        run = functools.partial(run, benchmark=arguments.benchmark)
    run(settings.on(device), device)


def with_fitting_shards(
    settings: Settings, encoded: bool, arguments: argparse.Namespace
) -> Settings:
    """See `preflight.with_shards`. encoded: whether the pictures are those of DATA_DIR, not of
    SOURCE_DIR.
    """
    from .attribution.preflight import number_of_pictures, with_shards

    place = settings.data_dir if encoded else settings.source_dir
    count = number_of_pictures(settings.but(data_dir=place)) if place else 0
    return with_shards(settings, count, arguments.num_split is not None)
