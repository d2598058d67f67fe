"""`concept-trak cad-bench-sd14`: component scores on the true architecture of Stable Diffusion v1.4
with random weights: seconds and peak memory, beside what the published schedule costs.

Measured: a guided step and a scored state (forward and base branch, backward). Computed from them:
one seed over 50 levels, here on one trajectory (50 guided steps) and published (a new trajectory
for each level, 1 + 2 + ... + 50 = 1,275 guided steps), with 50 scored states each.
"""

from __future__ import annotations

import json

import torch

from concept_trak.components.objective import COMPONENT_OBJECTIVES
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import score
from concept_trak.components.selection import SelectionRule, choose
from concept_trak.components.states import Sampling, trajectory
from concept_trak.gradients.state import State
from concept_trak.models.ddim import GuidedDenoiser
from concept_trak.settings import Settings, as_dict, provenance
from experiments.scale.sd14 import build_sd14
from experiments.scale.timing import peak_rss_gib, timed

LEVELS, PUBLISHED_STEPS = 50, sum(range(1, 51))


def bench(settings: Settings, device: str) -> dict:
    """Print what was measured and computed; the last line is one JSON object."""
    print("building Stable Diffusion v1.4 with random weights: 4.3 GB in fp32", flush=True)
    model = build_sd14(device, "fp32")
    among = select(model.network, settings.selection)
    count = sum(c.weight.numel() for c in among)
    print(
        f"{count:,} weights of {len(among)} layers; three fp32 copies: {12 * count / 2**30:.1f} GiB"
    )
    cond, base = model.encode_prompts(["a picture in the style of art", ""]).split()
    started = peak_rss_gib()
    (seen,) = trajectory(model, cond, base, 0, Sampling(3.0, 1, 1))
    with torch.no_grad():
        guided = GuidedDenoiser(model, cond, base, 3.0)
        step, _ = timed(lambda: guided.eps(seen.x_t, int(seen.t)))
    states = [State(int(seen.t), seen.x_t, cond, base)]
    state, scores = timed(
        lambda: score(model, COMPONENT_OBJECTIVES["erase"], among, lambda _: states, 1)
    )
    sorting, chosen = timed(lambda: choose(scores, among, SelectionRule(0.001, paper=True)))
    result = {
        "weights": count,
        "layers": len(among),
        "seconds": {"guided_step": step, "scored_state": state, "choice": sorting},
        "seed_of_50_levels_computed": LEVELS * (step + state),
        "published_schedule_computed": PUBLISHED_STEPS * step + LEVELS * state,
        "zeroed_at_0.001_by_the_published_rule": chosen.count,
        "layers_that_it_cannot_touch": len(chosen.untouched),
        "model_gib": started,
        "peak_gib": peak_rss_gib(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    ours = result["seed_of_50_levels_computed"]
    theirs = result["published_schedule_computed"]
    measured = f"a guided step {step:.1f} s, a scored state {state:.1f} s"
    print(f"{measured}, peak {result['peak_gib']:.1f} GiB")
    print(f"50 levels: {ours / 60:.0f} min here, {theirs / 60:.0f} min as published")
    print(json.dumps({**result, "settings": as_dict(settings), "provenance": provenance()}))
    return result
