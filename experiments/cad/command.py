"""`concept-trak cad-eval`, `cad-verify`, `cad-replay`, `cad-counterfactual`, `cad-rare`,
`cad-protocol` and `cad-bench-sd14`: the table of component attribution on the embedded model, an
edit with its certificate, scores split over the pictures of a training, edits beside retraining,
amplifying what was rare in training, the published protocols for an edited Stable Diffusion, and
what scores cost on its architecture.

The last line of output is one JSON object; experiments/cad/README.md explains it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from concept_trak.flags import add_setting_flags, settings_of


def add_parser(verbs: Any) -> None:
    """The sub-commands, with the flags of `Settings`."""
    says = "Erase concepts from the weights, and let the judge say what is gone and what is kept."
    sub = verbs.add_parser("cad-eval", help=says, description=says)
    uses = ("judged", "num_queries", "score_seeds", "gen_guidance_scale", "results_dir", "model")
    add_setting_flags(sub, (*uses, "data_dir", "device", "gpu_id"))
    sub.set_defaults(run=run)
    says = "Search an edit that erases a concept, and certify it; or say that none does."
    sub = verbs.add_parser("cad-verify", help=says, description=says)
    uses = ("concept", "prompt", "target_concepts", "target_ua", "min_retention", "judged")
    uses += ("score_seeds", "gen_guidance_scale", "results_dir", "model")
    add_setting_flags(sub, (*uses, "data_dir", "device", "gpu_id"))
    sub.set_defaults(run=run_verify)
    says = "Replay the training of the small model: which pictures put a concept's score into it?"
    sub = verbs.add_parser("cad-replay", help=says, description=says)
    uses = ("concept", "prompt", "target_concepts", "base_prompt", "selection", "ratio", "methods")
    uses += ("granularity", "score_seeds", "gen_guidance_scale", "gen_num_inference_steps")
    uses += ("seed", "replay_steps", "truth_dir", "results_dir", "model")
    add_setting_flags(sub, (*uses, "data_dir", "device", "gpu_id"))
    sub.set_defaults(run=run_replay)
    says = "Retrain without a concept's top pictures: do the weights of its edit lose their score?"
    sub = verbs.add_parser("cad-counterfactual", help=says, description=says)
    uses = ("selection", "ratio", "granularity", "score_seeds", "replay_steps", "truth_dir")
    add_setting_flags(sub, (*uses, "results_dir", "model", "data_dir", "device", "gpu_id"))
    sub.set_defaults(run=run_counterfactual)
    says = "Amplify objects of which a small model learned two pictures: are they drawn more often?"
    sub = verbs.add_parser("cad-rare", help=says, description=says)
    uses = ("replay_steps", "gen_guidance_scale", "truth_dir", "results_dir", "model")
    add_setting_flags(sub, (*uses, "data_dir", "device", "gpu_id"))
    sub.set_defaults(run=run_rare)
    says = "Measure an edited pipeline by a published protocol: objects, nudity, styles, retention."
    sub = verbs.add_parser("cad-protocol", help=says, description=says)
    uses = ("protocols", "edits", "concept", "num_queries", "seed", "gen_guidance_scale")
    uses += ("gen_num_inference_steps", "negative_prompt", "num_split", "shards", "batch_size")
    add_setting_flags(sub, (*uses, "sd_model_path", "dtype", "results_dir", "device", "gpu_id"))
    sub.set_defaults(run=run_protocol, reads_edits=True)
    says = "Time component scores on the architecture of Stable Diffusion, with random weights."
    sub = verbs.add_parser("cad-bench-sd14", help=says, description=says)
    add_setting_flags(sub, ("selection", "device", "gpu_id"))
    sub.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> None:
    """See `sd14.bench`."""
    given = settings_of(arguments)
    from concept_trak.models.device import pick_device

    from .sd14 import bench

    bench(given, pick_device(given.device, given.gpu_id))


def run_replay(arguments: argparse.Namespace) -> None:
    """Train the small model where that is missing, replay it, and print what was found."""
    given = settings_of(arguments)
    from concept_trak.attribution.task import AttributionTask
    from concept_trak.models.device import pick_device
    from concept_trak.report.component_report import concept_prompts

    from .replay_attribution import replay

    concept_prompts(given)  # an unknown concept is told before a model is loaded
    device = pick_device(given.device, given.gpu_id)
    print(json.dumps(replay(AttributionTask(given.on(device), device))))


def run_counterfactual(arguments: argparse.Namespace) -> None:
    """Train what is missing, measure, print the table and its line."""
    given = settings_of(arguments)
    from concept_trak.attribution.task import AttributionTask
    from concept_trak.models.device import pick_device

    from .counterfactual import counterfactual

    device = pick_device(given.device, given.gpu_id)
    print(json.dumps(counterfactual(AttributionTask(given.on(device), device))))


def run_rare(arguments: argparse.Namespace) -> None:
    """Train what is missing, choose, measure, print the table and its line."""
    given = settings_of(arguments)
    from concept_trak.attribution.task import AttributionTask
    from concept_trak.models.device import pick_device

    from .amplify_rare import rare

    device = pick_device(given.device, given.gpu_id)
    print(json.dumps(rare(AttributionTask(given.on(device), device))))


def run_verify(arguments: argparse.Namespace) -> None:
    """Search, probe, write the certificate and print it."""
    given = settings_of(arguments)
    from concept_trak.models.device import pick_device
    from concept_trak.report.component_report import concept_prompts

    from .certificate import certify

    concept_prompts(given)  # an unknown concept is told before a model is loaded
    device = pick_device(given.device, given.gpu_id)
    print(json.dumps(certify(given.on(device), device)))


def run_protocol(arguments: argparse.Namespace) -> None:
    """Draw, measure, print the table and its line."""
    given = settings_of(arguments)
    from concept_trak.models.device import pick_device

    from .protocol.run import protocol

    device = pick_device(given.device, given.gpu_id)
    if line := protocol(given.on(device), device):
        print(json.dumps(line))


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and its line."""
    given = settings_of(arguments)
    from concept_trak.attribution.task import AttributionTask
    from concept_trak.models.device import pick_device
    from concept_trak.settings import provenance
    from experiments.benchmark.results import result_folder, write_metrics

    from .markdown import markdown
    from .result_cache import MeasurementCache
    from .table import Size, evaluate, json_summary
    from .testbed import EraseSetup

    device = pick_device(given.device, given.gpu_id)
    task = AttributionTask(given.on(device), device)
    size = Size.of(given.judged, given.num_queries)
    setup = EraseSetup(task)
    found = json_summary(evaluate(setup, size)) | {"provenance": provenance()}
    model, data = task.model.identity(), task.data.content_hash()
    made_from = [model, data, given.score_seeds, given.judged]
    with result_folder(task.settings, "cad", "table", made_from) as folder:
        write_metrics(folder, "metrics", found, task.settings)
        MeasurementCache(setup).gather(folder / "cells.json")
    print(f"\n{markdown(found)}\n\n{json.dumps(found)}")
