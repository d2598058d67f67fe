"""The cases of the benchmark: train rows and query gradients by the engine and by the literal
reference, and the ratios of their times.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from concept_trak.attribution.naming import query_timesteps, train_timesteps
from concept_trak.attribution.prompts import contrast_prompts, split_list
from concept_trak.datasets.image_folder import load_folder
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import concept_cotangent, train_gradients
from concept_trak.gradients.projection import projection_for
from concept_trak.gradients.state import rebatch
from concept_trak.gradients.states import QueryStart, TrainBatch, query_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.sample import initial_noise
from concept_trak.models.text_to_image import TextToImage, load_pipeline
from concept_trak.settings import Settings

from .literal_recipe import BATCH_SIZE, DRAWS, ReferenceImplementation
from .timing import TimedFunction, ratio, time_in_turn


@dataclass(frozen=True)
class Inputs:
    """One case's model and tensors: x0 [B, C, h, w] and captions of train images; the query's x_T
    and conditions of one prompt each.

    The query's picture, where its states are noisings, is the first train image.
    """

    settings: Settings
    model: TextToImage
    x0: torch.Tensor
    cond: Condition
    x_T: torch.Tensor
    cond_prompt: Condition
    cond_plus: Condition
    cond_minus: Condition
    cond_null: Condition


def load_inputs(settings: Settings, images: int) -> Inputs:
    """The first `images` of the train split, and the query of the settings' first target.

    UserError as its parts raise it.
    """
    s, data = settings, load_folder(settings.data_dir).split("train")
    data, device = data.subset(range(min(images, len(data)))), s.device or "cpu"
    model = load_pipeline(s.sd_model_path, device, s.on(device).dtype, s.lora_path)
    x0 = model.encode_images(data.images(range(len(data)), size=model.image_size))
    targets = split_list(s.target_concepts)[:1]
    plus, minus = contrast_prompts(s.query_form, s.prompt, targets)[0]
    encoded = model.encode_prompts([s.prompt, plus, minus, "", *data.captions])
    x_T = initial_noise(model.latent_shape, s.seed).to(x0)
    return Inputs(s, model, x0, encoded[4:], x_T, *encoded[:4].split())


def row_maker(inputs: Inputs) -> GradientComputer:
    """Of the settings, for this model."""
    s, model = inputs.settings, inputs.model
    parameters = PerSampleVjp(model.network, s.layer).parameters
    return GradientComputer(
        model, projection_for(parameters, s, model.device), s.layer, s.normalize
    )


def engine_rows(inputs: Inputs) -> TimedFunction:
    """() -> train rows [B, k] by the engine, with the settings' recipe."""
    s, maker = inputs.settings, row_maker(inputs)
    states = train_timesteps(s)
    batches = [*zip(inputs.x0.split(s.batch_size), inputs.cond.split(s.batch_size), strict=True)]

    def run() -> torch.Tensor:
        rows = []
        for x0, cond in batches:
            shown = TrainBatch(x0, cond, inputs.cond_null, states)
            rows.append(train_gradients(maker, s.f, shown).values)
        return torch.cat(rows)

    return run


def literal(inputs: Inputs) -> ReferenceImplementation:
    """The reference's recipe on these inputs."""
    s = inputs.settings
    inputs.model.network.to(memory_format=torch.contiguous_format)  # as diffusers loads it
    return ReferenceImplementation(inputs.model, inputs.cond_null, s.layer, s.proj_dim, s.proj_seed)


def literal_rows(inputs: Inputs) -> TimedFunction:
    """() -> train rows [B, k] by the reference recipe done literally, in its own batches."""
    recipe, scale = literal(inputs), inputs.settings.train_guidance_scale
    batches = [*zip(inputs.x0.split(BATCH_SIZE), inputs.cond.split(BATCH_SIZE), strict=True)]
    return lambda: torch.cat([recipe.train_rows(x0, cond, scale) for x0, cond in batches])


def engine_query(inputs: Inputs) -> TimedFunction:
    """() -> concept row [1, k] from the settings' states."""
    s, maker = inputs.settings, row_maker(inputs)
    start, conds = QueryStart(inputs.x_T, inputs.x0[:1]), (inputs.cond_prompt, inputs.cond_null)

    def run() -> torch.Tensor:
        read = query_states_of(inputs.model, query_timesteps(s), start, *conds, s.batch_size)
        asked = rebatch(read, s.batch_size)
        contrasted = (x.contrasting(inputs.cond_plus, inputs.cond_minus) for x in asked)
        return maker.mean_row(contrasted, concept_cotangent(s.f))

    return run


def literal_query(inputs: Inputs) -> TimedFunction:
    """() -> concept row [1, k] of the reference's nine draws."""
    s, recipe = inputs.settings, literal(inputs)
    contrast, sampler = (inputs.cond_plus, inputs.cond_minus), (s.concept_guidance_scale, s.eta)
    return lambda: recipe.query_row(inputs.x_T, *contrast, DRAWS, *sampler)


# name: (builder, recipe)
CASES = {
    "literal_rows": (literal_rows, "reference"),
    "reference_rows": (engine_rows, "reference"),
    "default_rows": (engine_rows, "default"),
    "literal_query": (literal_query, "reference"),
    "reference_query": (engine_query, "reference"),
    "default_query": (engine_query, "default"),
}
# name: (slow case, fast case), compared by the row or gradient
RATIOS = {
    "reference_speedup": ("literal_rows", "reference_rows"),
    "default_speedup": ("literal_rows", "default_rows"),
    "query_speedup": ("literal_query", "reference_query"),
    "default_query_speedup": ("literal_query", "default_query"),
}


def make_work(case: str, settings: Settings, images: int) -> TimedFunction:
    """What a case is timed by; builds its inputs."""
    return CASES[case][0](load_inputs(settings, images))


def row_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest over rows of ||got - want|| / ||want||."""
    return float((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max())


def bench_engine(settings: Mapping[str, Settings], images: int, repeats: int) -> dict:
    """Train rows and query gradients of every case, settings by recipe; JSON-ready.

    {ratio: median over rounds}, its `spread` (least, greatest), and of every case `seconds_each`
    row or gradient, `peak_gib` and `added_gib`.
    """
    answers = {}
    for kind, count in (("_rows", images), ("_query", 1)):  # three processes at a time
        chosen = {case: r for case, (_, r) in CASES.items() if case.endswith(kind)}
        makes = {case: partial(make_work, case, settings[r], count) for case, r in chosen.items()}
        answers |= time_in_turn(makes, repeats)
    # in one call: rows, or gradients of a query's states
    units = {case: len(rounds[0].result) for case, rounds in answers.items()}
    units |= {f"{recipe}_query": s.epochs * (s.nfe - 1) for recipe, s in settings.items()}
    units["literal_query"] = len(DRAWS)
    seconds = {case: [answer.seconds for answer in rounds] for case, rounds in answers.items()}
    ratios = {
        name: ratio(seconds[slow], seconds[fast], units[fast] / units[slow])
        for name, (slow, fast) in RATIOS.items()
    }
    got, want = (answers[case][0].result for case in ("reference_rows", "literal_rows"))
    return {
        **{name: value for name, (value, _) in ratios.items()},
        "reference_max_rel_error": row_error(got, want),
        "spread": {name: spread for name, (_, spread) in ratios.items()},
        "seconds_each": {c: statistics.median(of) / units[c] for c, of in seconds.items()},
        "peak_gib": {c: max(a.peak_gib for a in rounds) for c, rounds in answers.items()},
        "added_gib": {c: max(a.added_gib for a in rounds) for c, rounds in answers.items()},
    }
