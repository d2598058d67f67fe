"""The cases of the benchmark and their timing: engine and literal reference, train rows and query
gradients.

Each case runs in a process of its own, so that its peak memory is its own. The processes of a group
are timed in turn, round after round, and every ratio is taken within a round: a machine that is
busy for a while slows both sides.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from ...attribution.attribute import query_states
from ...attribution.prompts import contrasts, split_list
from ...attribution.train_grad import train_states
from ...datasets.folder import load_folder
from ...errors import UserError
from ...models.text_to_image import TextToImage, load_pipeline
from ...rows import featurize, query
from ...rows.projection import projection_for
from ...rows.vjp import PerSampleVjp
from ...settings import Settings
from . import literal_reference
from .scoring import peak_rss_gib, ratio, restart_peak_rss

LITERAL_BATCH = 4  # the BATCH_SIZE of the published run
LITERAL_DRAWS = tuple(
    range(1, 10)
)  # the reference draws s from 1..9; one of each has the expected cost exactly
WARM_UP_ROUNDS = 1


@dataclass
class Inputs:
    """One case's model and tensors: x0 [B, C, h, w], cond [B, T, d] of train images; the query's
    x_T and conditions [1, T, d].

    The query's picture, where its states are noisings, is the first train image.
    """

    settings: Settings
    model: TextToImage
    x0: torch.Tensor
    cond: torch.Tensor
    x_T: torch.Tensor
    cond_prompt: torch.Tensor
    cond_plus: torch.Tensor
    cond_minus: torch.Tensor
    cond_null: torch.Tensor


def load_inputs(settings: Settings, images: int) -> Inputs:
    """The first `images` of the train split, and the query of the settings' first target. UserError
    as its parts raise it.
    """
    data = load_folder(settings.data_dir).split("train")
    data = data.subset(range(min(images, len(data))))
    device = settings.device or "cpu"
    model = load_pipeline(
        settings.sd_model_path, device, settings.on(device).dtype, settings.lora_path
    )
    x0 = model.encode_images(data.images(range(len(data)), size=model.image_size))
    plus, minus = contrasts(
        settings.query_form, settings.prompt, split_list(settings.target_concepts)[:1]
    )[0]
    *asked, cond = model.encode_prompts([settings.prompt, plus, minus, "", *data.captions]).split(
        [1, 1, 1, 1, len(data)]
    )
    x_T = torch.randn(
        1, *model.latent_shape, generator=torch.Generator().manual_seed(settings.seed)
    ).to(x0)
    return Inputs(settings, model, x0, cond, x_T, *asked)


def projection_of(inputs: Inputs):
    s = inputs.settings
    return projection_for(
        PerSampleVjp(inputs.model.network, s.layer).parameters, s, inputs.model.device
    )


def engine_rows(inputs: Inputs):
    """() -> train rows [B, k] by the engine, with the settings' recipe."""
    s, projection = inputs.settings, projection_of(inputs)

    def run():
        return torch.cat(
            [
                featurize.featurize(
                    inputs.model,
                    projection,
                    x0,
                    cond,
                    inputs.cond_null,
                    layer=s.layer,
                    objective=s.f,
                    states=train_states(s),
                    normalize=s.normalize,
                )[0]
                for x0, cond in zip(inputs.x0.split(s.batch_size), inputs.cond.split(s.batch_size))
            ]
        )

    return run


def literal_rows(inputs: Inputs):
    """() -> train rows [B, k] by the reference recipe done literally, in its own batches."""
    s = inputs.settings
    inputs.model.network.to(memory_format=torch.contiguous_format)  # as diffusers loads it
    return lambda: torch.cat(
        [
            literal_reference.train_rows(
                inputs.model,
                x0,
                cond,
                inputs.cond_null,
                layer=s.layer,
                scale=s.train_guidance_scale,
                proj_dim=s.proj_dim,
                proj_seed=s.proj_seed,
            )
            for x0, cond in zip(inputs.x0.split(LITERAL_BATCH), inputs.cond.split(LITERAL_BATCH))
        ]
    )


def engine_query(inputs: Inputs):
    """() -> concept row [1, k] from the settings' trajectories."""
    s, projection = inputs.settings, projection_of(inputs)

    def run():
        read = query.read_states(
            inputs.model,
            query_states(s),
            inputs.cond_prompt,
            inputs.cond_null,
            x_T=inputs.x_T,
            x0=inputs.x0[:1],
            batch_size=s.batch_size,
        )
        return query.concept_gradient(
            inputs.model,
            projection,
            read,
            inputs.cond_plus,
            inputs.cond_minus,
            layer=s.layer,
            normalize=s.normalize,
            two_sided=s.two_sided,
            batch_size=s.batch_size,
        )

    return run


def literal_query(inputs: Inputs):
    """() -> concept row [1, k] of nine epochs of the reference."""
    s = inputs.settings
    inputs.model.network.to(memory_format=torch.contiguous_format)
    return lambda: literal_reference.query_row(
        inputs.model,
        inputs.x_T,
        inputs.cond_plus,
        inputs.cond_minus,
        inputs.cond_null,
        layer=s.layer,
        draws=LITERAL_DRAWS,
        scale=s.concept_guidance_scale,
        eta=s.eta,
        proj_dim=s.proj_dim,
        proj_seed=s.proj_seed,
    )


# name: (builder, recipe)
CASES = {
    "literal_rows": (literal_rows, "reference"),
    "reference_rows": (engine_rows, "reference"),
    "default_rows": (engine_rows, "default"),
    "literal_query": (literal_query, "reference"),
    "reference_query": (engine_query, "reference"),
    "default_query": (engine_query, "default"),
}


def work(connection, case: str, settings: Settings, images: int) -> None:
    """The process of one case: says when it is ready, then answers every request until None.

    An answer is (seconds, result, peak GiB, GiB of it that the case added to imports, model and
    inputs).
    """
    try:
        run = CASES[case][0](load_inputs(settings, images))
        resident = restart_peak_rss()
        connection.send(None)
        while connection.recv():
            started = time.perf_counter()
            result = run()
            connection.send(
                (
                    time.perf_counter() - started,
                    result.cpu().numpy(),
                    peak_rss_gib(),
                    peak_rss_gib() - resident,
                )
            )
    except UserError as error:
        connection.send(error)


def time_in_turn(cases: dict[str, Settings], images: int, rounds: int) -> dict[str, list]:
    """{case: [answer of `work`] a round}, the cases of a round one after the other. UserError from
    a process's set-up.
    """
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}
    try:
        for case, settings in cases.items():
            pipes[case], theirs = context.Pipe()
            processes.append(
                context.Process(target=work, args=(theirs, case, settings, images), daemon=True)
            )
            processes[-1].start()
            theirs.close()
        for case, pipe in pipes.items():
            receive(case, pipe)
        answers = {case: [] for case in cases}
        for number in range(WARM_UP_ROUNDS + rounds):
            for case, pipe in pipes.items():
                pipe.send(True)
                answers[case].append(receive(case, pipe))
            seconds = ", ".join(f"{case} {found[-1][0]:.2f} s" for case, found in answers.items())
            print(
                f"{'warm-up' if number < WARM_UP_ROUNDS else f'round {number - WARM_UP_ROUNDS + 1}'}: {seconds}",
                flush=True,
            )
        for pipe in pipes.values():
            pipe.send(None)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.terminate()
    return {case: found[WARM_UP_ROUNDS:] for case, found in answers.items()}


def receive(case: str, pipe):
    """The next message of a case's process. UserError if it sent one or died, as for want of
    memory.
    """
    try:
        message = pipe.recv()
    except EOFError:
        raise UserError(f"the process of {case} died; fewer --images need less memory") from None
    if isinstance(message, UserError):
        raise message
    return message


def speedup(slow: list, fast: list, factor: float = 1.0) -> tuple[float, list[float]]:
    """`bench_scoring.ratio` of the seconds of two cases of `time_in_turn`."""
    return ratio([r[0] for r in slow], [r[0] for r in fast], factor)


def row_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest over rows of ||got - want|| / ||want||."""
    return float((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max())


def bench_engine(settings: dict[str, Settings], images: int, repeats: int) -> dict:
    """Train rows and query gradients of every case; JSON-ready."""
    chosen = {case: settings[recipe] for case, (_, recipe) in CASES.items()}
    rows = time_in_turn({c: s for c, s in chosen.items() if c.endswith("_rows")}, images, repeats)
    asked = time_in_turn({c: s for c, s in chosen.items() if c.endswith("_query")}, 1, repeats)
    gradients = {f"{r}_query": s.epochs * (s.nfe - 1) for r, s in settings.items()} | {
        "literal_query": len(LITERAL_DRAWS)
    }
    ratios = {
        "reference_speedup": speedup(rows["literal_rows"], rows["reference_rows"]),
        "default_speedup": speedup(rows["literal_rows"], rows["default_rows"]),
        **{
            name: speedup(asked["literal_query"], asked[case], gradients[case] / len(LITERAL_DRAWS))
            for name, case in (
                ("query_speedup", "reference_query"),
                ("default_query_speedup", "default_query"),
            )
        },
    }
    units = {
        case: gradients.get(case, len(rounds[0][1])) for case, rounds in (rows | asked).items()
    }
    return {
        **{name: value for name, (value, _) in ratios.items()},
        "reference_max_rel_error": row_error(
            rows["reference_rows"][0][1], rows["literal_rows"][0][1]
        ),
        "spread": {name: spread for name, (_, spread) in ratios.items()},
        "seconds_each": {
            case: statistics.median(r[0] for r in rounds) / units[case]
            for case, rounds in (rows | asked).items()
        },
        "peak_gib": {case: max(r[2] for r in rounds) for case, rounds in (rows | asked).items()},
        "added_gib": {case: max(r[3] for r in rounds) for case, rounds in (rows | asked).items()},
    }
