"""`concept-trak VERB`: every field of `Settings` is a flag (NUM_SPLIT -> --num-split);
one line for a user's mistake.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .flags import FROM_ENV, Parser, add_setting_flags, place, refuse_misspelt, settings_of
from .isolated import isolate
from .settings import JUDGE, OF_WEIGHTS, ROOT, Settings, version
from .system import VERBOSITY, ended_by_sigterm, say, speak, speak_plainly


def run_attribute(settings: Settings, device: str) -> None:
    """Answer PROMPT; prints where the report is."""
    from .attribution.corpus import Corpus
    from .report.answer import attribute

    print(f"report: {os.path.relpath(attribute(Corpus(settings, device)))}")


def run_concepts(settings: Settings, device: str) -> None:
    """List what the data names."""
    from .attribution.early import train_split
    from .datasets.listing import listing

    print(listing(train_split(settings.data_dir)))


def run_estimate(settings: Settings, device: str) -> None:
    """Say what run_own_data.sh will take."""
    from .attribution.early import own_estimate

    print(own_estimate(settings))


def run_explore(settings: Settings, device: str) -> None:
    """Make the page of all answers; prints where it is."""
    from .report.explorer import explore

    if path := explore(settings):
        print(f"explorer: {os.path.relpath(path)}")


def run_serve(settings: Settings, device: str) -> None:
    """Answer questions over HTTP; prints where."""
    from .service.command import serve

    serve(settings, device)


def run_suspects(settings: Settings, device: str) -> None:
    """List the training pictures whose caption does not fit; prints where the list is."""
    from .attribution.corpus import Corpus
    from .report.suspects import suspects

    print(f"suspects: {os.path.relpath(suspects(Corpus(settings, device)))}")


def run_train_grad(settings: Settings, device: str) -> None:
    """Fill the store; prints its state."""
    from .attribution.corpus import Corpus
    from .attribution.train_grad import train_grad

    store = train_grad(Corpus(settings, device))
    print(
        f"{store.where}: {store.num_rows} rows of {store.dim}, shards left: {len(store.pending())}"
    )


def run_build_index(settings: Settings, device: str) -> None:
    """Make or update the index of the rows; prints where it is."""
    from .attribution.corpus import Corpus
    from .attribution.searched import build_index

    print(f"index: {os.path.relpath(build_index(Corpus(settings, device)).folder)}")


def run_evaluate(settings: Settings, device: str, benchmark: str = "emoji") -> None:
    """Evaluate every method on a benchmark."""
    from .attribution.corpus import Corpus
    from .evaluation.evaluate import evaluate

    evaluate(Corpus(settings, device), benchmark)


def run_train_model(settings: Settings, device: str) -> None:
    """Train the embedded pipeline, beside the committed one."""
    import torch

    from .datasets.folder import load_folder
    from .workshop.embedded.train import TrainSettings, train

    torch.set_flush_denormal(True)
    work = ROOT / "data/emoji/checkpoints"
    train(load_folder(settings.data_dir), work / "pipeline", work, TrainSettings())
    print(
        f"pipeline: {os.path.relpath(work / 'pipeline')}; use it with SD_MODEL_PATH or move it to "
        "data/emoji/pipeline"
    )


def run_judge_model(settings: Settings, device: str) -> None:
    """Measure the embedded model by its judge."""
    from .attribution.corpus import Corpus
    from .evaluation.model import measure_model

    measure_model(Corpus(settings, device))


def run_prepare(settings: Settings, device: str) -> None:
    """Encode SOURCE_DIR; prints where to."""
    from .datasets.prepare import prepare

    print(f"encoded: {os.path.relpath(prepare(settings, device))}")


def run_bench_sd14(settings: Settings, device: str) -> None:
    """Time the architecture of SD v1.4."""
    from .evaluation.bench.sd14 import bench_sd14

    bench_sd14(settings, device)


def run_task_grad(settings: Settings, device: str) -> None:
    """Rows of the exemplars of TASK_IDX."""
    from .evaluation.abc import run_rows

    run_rows(settings, device, "exemplar")


def run_test_grad(settings: Settings, device: str) -> None:
    """Rows of the queries of TASK_IDX."""
    from .evaluation.abc import run_rows

    run_rows(settings, device, "query")


def run_evaluate_tasks(settings: Settings, device: str) -> None:
    """Evaluate the tasks of TASK_IDX."""
    from .evaluation.abc import evaluate_tasks

    evaluate_tasks(settings, device)


def run_make_tasks(settings: Settings, device: str) -> None:
    """Write TASK_JSON; prints how many tasks."""
    from .datasets.abc import write_tasks

    made = write_tasks(Path(settings.data_dir), Path(settings.task_json))
    print(f"{os.path.relpath(settings.task_json)}: {made} tasks")


def run_train_judge(settings: Settings, device: str) -> None:
    """Train the judge and save it where it is committed."""
    from .datasets.folder import load_folder
    from .models.text_to_image import load_pipeline
    from .workshop.judge.train import train_and_save

    model = load_pipeline(settings.sd_model_path, device, settings.dtype)
    data = load_folder(settings.data_dir)
    train_and_save(data, model, JUDGE, seed=settings.seed)


def run_export(folder: str, kind: str, settings: Settings, device: str) -> None:
    """Export the finished store; prints where to."""
    from .attribution.corpus import Corpus
    from .attribution.train_grad import open_store
    from .store.export import export

    export(open_store(Corpus(settings, device)), Path(folder), kind)
    print(f"exported: {os.path.relpath(folder)}")


LINE = 1000  # characters of a message, whatever it quotes


@dataclass(frozen=True)
class Verb:
    """A sub-command: what it runs, one sentence on it, its flags after the verb in an example.

    uses: stages and fields of `Settings` that bear on it; its help shows no others. check: a
    function of `attribution.early` that refuses what can be refused before anything is loaded.
    light: it needs no model and no torch.
    """

    run: Callable[[Settings, str], None]
    says: str
    example: str
    uses: tuple[str, ...]
    check: str = ""
    light: bool = False


PLACE = ("device", "gpu_id")
MODEL = ("model", "data_dir", *PLACE)
CLUSTER = ("executor", "num_cpus", "num_gpus", "piece_rows", "task_retries")
ROWS = ("rows", "projection", "grad_dir", "store_cache", "store_dtype", "batch_size", "num_train")
ROWS += MODEL
TASK_ROWS = ("tasks", "force_recompute_concept_grad", *ROWS)
PICTURES = ("negative_prompt", "gen_guidance_scale", "gen_num_inference_steps")
QUERIES = ("scope", "concept_guidance_scale", "eta", "epochs", "gen_num_inference_steps")
VERBS = {
    "attribute": Verb(
        run_attribute,
        "Generate a picture, and rank the training pictures that taught the model each concept.",
        "--prompt 'an owl in the style of openmoji line' --target-concepts 'owl|openmoji line'",
        (
            *("question", "generation", "query", "scoring", "report", "methods", "results_dir"),
            *(*OF_WEIGHTS, *ROWS),
        ),
        check="check_question",
    ),
    "concepts": Verb(
        run_concepts,
        "List the concepts that the labels of the pictures name, or else the words of captions.",
        "--data-dir my_pictures",
        ("data_dir",),
        light=True,
    ),
    "estimate": Verb(
        run_estimate,
        "Say what pictures of one's own will take, in time and disk; nothing is loaded or written.",
        "--benchmark own --source-dir data/emoji --sd-model-path data/emoji/pipeline"
        " --prompt 'a cat' --target-concepts cat",
        ("question", "source_dir", "nfe", "proj_dim", "store_dtype", "grad_dir", "sd_model_path"),
        light=True,
    ),
    "explore": Verb(
        run_explore,
        "Make one page of all answers there are, to filter, sort and compare; needs no server.",
        "--results-dir experiments/emoji/results/qual",
        ("results_dir",),
        light=True,
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
    "evaluate": Verb(
        run_evaluate,
        "Attribute many queries with every method, and compare the top ten with the labels.",
        "--num-queries 16 --methods concept_trak,das",
        ("evaluation", "query_form", "generation", "max_memory", "store", "results_dir")
        + (*QUERIES, *ROWS),
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
    ),
    "make-tasks": Verb(
        run_make_tasks,
        "List the tasks of AbC from its files.",
        "--task-json tasks.json",
        ("data_dir", "task_json"),
        light=True,
    ),
    "prepare": Verb(
        run_prepare,
        "Encode a folder of pictures and captions once, for a model.",
        "--source-dir my_pictures --data-dir encoded",
        ("source_dir", "batch_size", *MODEL),
    ),
    "bench-sd14": Verb(
        run_bench_sd14,
        "Time the engine on the architecture of Stable Diffusion, with random weights.",
        "--dtype fp32",
        ("layer", "proj_dim", "dtype", *PLACE),
    ),
}
# Modules with an `add_parser(verbs)` that adds sub-commands and sets `run`, called with the
# arguments.
WITH_OWN_FLAGS = (
    *("evaluation.bench.command", "evaluation.bench.many", "evaluation.bench.index_command"),
    "evaluation.bench.cluster_command",
    *("evaluation.retraining.command", "evaluation.labelled.command"),
    *("evaluation.small_abc.command", "evaluation.overview", "evaluation.cad.command"),
    *("report.weights_command", "service.bench"),
    *("workshop.tokens.command", "workshop.fetch.download"),
)


def parser() -> argparse.ArgumentParser:
    """One sub-command a verb; flags without a default, so that only what the user set overrides the
    recipe.
    """
    top = Parser(
        prog="concept-trak",
        description="Which training images taught a diffusion model a concept?",
        usage="%(prog)s VERB [--FLAG VALUE ...]",
        epilog="concept-trak VERB --help shows the flags of a verb, grouped, with their defaults.",
    )
    top.add_argument("--version", action="version", version=f"concept-trak {version()}")
    verbs = top.add_subparsers(
        dest="verb", required=True, title="verbs", metavar="VERB", prog=top.prog
    )
    for name, verb in VERBS.items():
        sub = add_verb(verbs, name, verb.says, verb.example)
        add_setting_flags(sub, verb.uses)
        sub.set_defaults(run=functools.partial(run_with_settings, verb.run, verb))
    add_export(verbs)
    for module in WITH_OWN_FLAGS:
        importlib.import_module(f".{module}", __package__).add_parser(verbs)
    return top


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
    if verb and verb.light:
        return run(settings, "cpu")
    if verb and verb.check:
        getattr(importlib.import_module(".attribution.early", __package__), verb.check)(settings)
    say(f"loading the model {settings.sd_model_path.removeprefix(f'{ROOT}/')} ...")
    # the other verbs have no use for GPU_IDS; the processes pick their own devices
    if run is run_train_grad and settings.executor == "ray":
        from .attribution.cluster import launch_tasks

        return launch_tasks(settings)
    if run is run_train_grad and (settings.gpu_ids or settings.executor == "gpus"):
        from .attribution.launch import launch_shards

        return launch_shards(settings)
    from .models.device import pick_device

    device = pick_device(settings.device, settings.gpu_id)
    if run is run_evaluate:
        run = functools.partial(run, benchmark=arguments.benchmark)
    run(settings.on(device), device)


def with_fitting_shards(
    settings: Settings, encoded: bool, arguments: argparse.Namespace
) -> Settings:
    """See `early.with_shards`. encoded: whether the pictures are those of DATA_DIR, not of
    SOURCE_DIR.
    """
    from .attribution.early import number_of_pictures, with_shards

    place = settings.data_dir if encoded else settings.source_dir
    count = number_of_pictures(settings.but(data_dir=place)) if place else 0
    return with_shards(settings, count, arguments.num_split is not None)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 2 with one line on standard error for a UserError, and for what the
    system refuses: a file, memory.
    """
    if argv is None:  # of the installed script
        isolate()
    speak_plainly()
    speak(0)  # until the arguments say otherwise
    try:
        with ended_by_sigterm():
            top = parser()
            arguments = top.parse_args(argv)
            speak(getattr(arguments, "level", 0))
            if os.environ.get(FROM_ENV):
                refuse_misspelt(os.environ, top.flags_of(arguments.verb))
            arguments.run(arguments)
    except (UserError, OSError, MemoryError, UnicodeError) as error:
        if VERBOSITY["level"] > 0:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch has no class of its own for the CPU's
        if "memory" not in str(error):
            raise
        print(f"error: {one_line(MemoryError(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def one_line(error: BaseException) -> str:
    """What went wrong and what mends it, in a line of bounded length."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        text = f"out of memory ({text}); set BATCH_SIZE, PROJ_DIM or MAX_MEMORY lower"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; mend that and run again"
    elif not isinstance(error, UserError):
        text = f"{text or type(error).__name__}; mend that and run again"
    return text if len(text) <= LINE else f"{text[: LINE // 2]} ... {text[-LINE // 2 :]}"
