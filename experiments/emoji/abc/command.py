"""`concept-trak small-abc`: learn the tokens, draw the queries, rank, print the table; the last
line of output is one JSON object.

Everything is kept below `experiments/emoji/results/abc` and GRAD_DIR and found again: a killed run
goes on. Some 25 minutes of one core for the tokens, 15 for the rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from concept_trak.flags import add_setting_flags, settings_of
from concept_trak.settings import Settings, results_folder

USES = ("methods", "rows", "projection", "query", "query_form", "scoring", "batch_size")


def add_parser(verbs: Any) -> None:
    """The sub-command `small-abc`, with the flags of `Settings` that bear on it."""
    says = "Find exemplars that taught a token among the embedded model's training pictures."
    sub = verbs.add_parser("small-abc", help=says, description=says)
    sub.add_argument(
        "--tokens",
        type=int,
        default=0,
        metavar="N",
        help="at most so many of a split; 0: all (tokens; default: 0)",
    )
    add_setting_flags(sub, (*USES, "grad_dir", "results_dir", "data_dir", "device", "gpu_id"))
    sub.set_defaults(run=run, needs_all_scores=True)


def run(arguments: argparse.Namespace) -> None:
    """Run it as the flags say. UserError for a method that there is not."""
    from concept_trak.models.device import pick_device

    asked, arguments.methods = arguments.methods or "", None  # some are names of `methods`
    given = settings_of(arguments)
    from .methods import COMPARED, method

    names = [n.strip() for n in asked.split(",") if n.strip()] or list(COMPARED)
    for name in names:
        method(name)
    device = pick_device(given.device, given.gpu_id)
    print(json.dumps(small_abc(given.on(device), device, names, arguments.tokens)))


def small_abc(settings: Settings, device: str, names: list[str], first: int = 0) -> dict[str, Any]:
    """{"published", "blind", "crowd": {method: Recall@10}, "ablation": [five of them], "steps",
    "levels": {step of the ablation: `level_shares`}}.
    """
    from concept_trak.atomic_io import write_bytes
    from concept_trak.attribution.task import AttributionTask
    from experiments.benchmark.plots import png
    from experiments.benchmark.results import result_folder, write_metrics

    from . import figures, scores, tables
    from .gradients import level_shares
    from .methods import ABLATION, METHODS
    from .tasks import read_tokens, tasks_of

    attribution_task = AttributionTask(settings, device)
    tokens = read_tokens(Path(settings.data_dir))
    tasks = tasks_of(tokens, attribution_task.train)
    if first:
        chosen = [t for s in ("tune", "report") for t in _of(tokens, s)[:first]]
        tasks = [task for task in tasks if task.token in chosen]
    asked = scores.AbcQueries(attribution_task, tokens, tasks, results_folder(settings, "abc"))
    told = {name: tables.figures(asked, scores.scores_of(asked, name)) for name in names}
    for name, found in scores.controls_of(asked).items():
        told[name] = tables.figures(asked, found)
    at_random = tables.chance(asked)
    table = tables.markdown(told, at_random)
    made: dict[str, Any] = {
        protocol: {name: entry[protocol]["recall_at_10"] for name, entry in told.items()}
        | {"chance": at_random[protocol]}
        for protocol in scores.PROTOCOLS
    }
    if set(ABLATION) <= set(names):
        made["ablation"] = [told[name]["published"]["recall_at_10"] for name in ABLATION]
        made["steps"] = tables.steps(told, ABLATION)
        made["levels"] = {n: level_shares(METHODS[n].task(attribution_task)) for n in ABLATION}
        table += "\n\n" + tables.levels_markdown(made["levels"])
    made |= {"queries": len(asked.split("report")), "figures": told}
    with result_folder(
        settings, "abc_tables", "small", [attribution_task.train_identity(), made]
    ) as folder:
        write_metrics(folder, "metrics", made, settings)
        write_bytes(folder / "table.md", f"{table}\n".encode())
        write_bytes(folder / "recall.png", png(figures.recall_against_k(told)))
        if "ablation" in made:
            figure = figures.ablation(made["ablation"], made["steps"])
            write_bytes(folder / "ablation.png", png(figure))
    print(table)
    return made


def _of(tokens: list[Any], split: str) -> list[Any]:
    return [token for token in tokens if token.split == split]
