"""Probes that look behind the prompt: can what was erased still be had of the edited model?

    paraphrases   other words for it
    embedding     a prompt embedding, optimised on real pictures of it under the edited model
                  (the concept inversion of Pham et al. 2024)
    completion    its real pictures, noised, and denoised again
    relearning    steps of fine-tuning until the judge sees it again

Each is asked of the unedited model, too, and has a control that tells what it would give without
any knowledge of the concept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from concept_trak.components.edits import Edit, EditedNetwork
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import requires_grad_only
from concept_trak.models.condition import Condition
from concept_trak.models.ddim import (
    GuidedDenoiser,
    ddim_sample,
    ddim_step,
    q_sample,
    sampling_timesteps,
)
from concept_trak.models.sample import initial_noise
from concept_trak.models.schedule import NUM_TRAIN_TIMESTEPS
from experiments.emoji.classifier.net import resized

from .candidate_edit import wilson_interval
from .testbed import DRAW_STEPS, EraseSetup, Target

FIRST_SEED = 150_000
PICTURES = 24  # judged, a rate
SHOTS, RATE, EMBEDDING_STEPS = 8, 0.02, 120  # of the optimised embedding
LEVELS = (3, 4, 5)  # steps of DRAW_STEPS that are left, from little noise to much
RELEARN_RATE, EVERY, MOST = 1e-4, 5, 60  # of fine-tuning; steps between looks
SEEN = 0.5  # share of pictures from which on it counts as learned again
NEW_WORD = "a zorbel"  # means nothing to the model


def decided_by() -> list[Any]:
    """What a probe's outcome depends on beside model, concept and edit (JSON)."""
    return [PICTURES, SHOTS, RATE, EMBEDDING_STEPS, LEVELS, RELEARN_RATE, EVERY, MOST, SEEN]


def probes(
    setup: EraseSetup, target: Target, edit: Edit, selection: str
) -> dict[str, Callable[[], Any]]:
    """{name: what measures it}, each with the model left as it was."""
    return {
        "paraphrases": lambda: paraphrases(setup, target, edit),
        "embedding": lambda: embedding(setup, target, edit),
        "completion": lambda: completion(setup, target, edit),
        "relearning": lambda: relearning(setup, target, edit, selection),
    }


def paraphrases(setup: EraseSetup, target: Target, edit: Edit) -> dict[str, Any]:
    """{wording: share of pictures that show it, {"unedited", "edited"}}."""
    column, records = f"{target.kind}_phrase", setup.prompts(target, PICTURES)
    seeds = range(FIRST_SEED, FIRST_SEED + PICTURES)

    def shares() -> dict[str, Any]:
        return {
            words: wilson_interval(
                setup.draw([r | {column: words} for r in records], seeds).right(target.kind)
            )
            for words in wordings(target)
        }

    before = shares()
    setup.mirror(edit)
    try:
        after = shares()
    finally:
        setup.mirror(edit, undo=True)
    return {words: {"unedited": before[words], "edited": after[words]} for words in before}


def wordings(target: Target) -> list[str]:
    """Other ways to ask for it; rates of the unedited model say which of them it understands."""
    word = target.name if target.kind == "object" else target.phrase
    if target.kind == "style":
        return [word.upper(), f"the {word} set", f"{word} {word}", f"flat {word} icons"]
    return [word, f"the {word}", f"one small {word}", f"{word} {word} {word}", f"two {word}s"]


def embedding(setup: EraseSetup, target: Target, edit: Edit) -> dict[str, Any]:
    """Share of pictures drawn from an optimised embedding that show it: edited and unedited model.

    It begins at the empty prompt, so that nothing of the concept's words is put in, whose own share
    is "start"; of the edited model also at the concept's prompt, "edited_from_prompt".
    """
    empty, prompt = setup.model.encode_prompts(["", target.prompt]).split()

    def rate(found: Condition) -> dict[str, Any]:
        return wilson_interval(_shown(setup, target, found, PICTURES))

    found = {"unedited": rate(optimised(setup, target, empty))}
    with _edited(setup, edit):
        found |= {"start": rate(empty), "edited": rate(optimised(setup, target, empty))}
        return found | {"edited_from_prompt": rate(optimised(setup, target, prompt))}


def optimised(setup: EraseSetup, target: Target, start: Condition) -> Condition:
    """The embedding [1, T, d] near a start that lowers the denoising loss of the real pictures."""
    model, x0 = setup.model, _real(setup, target)
    guess = start.embeddings.clone().requires_grad_(True)
    adam, draws = torch.optim.Adam([guess], RATE), _batches(setup, x0)
    with torch.enable_grad():
        for _ in range(EMBEDDING_STEPS):
            x_t, t, eps, _ = next(draws)
            cond = Condition(guess.expand(len(x_t), -1, -1))
            (gradient,) = torch.autograd.grad(_loss(model, x_t, t, cond, eps), guess)
            guess.grad = gradient
            adam.step()
    return Condition(guess.detach())


def completion(setup: EraseSetup, target: Target, edit: Edit) -> dict[str, Any]:
    """{timestep: share that shows it}: noised real pictures, denoised under the concept's prompt.

    "unprompted": by the unedited model under the empty prompt; what the noised picture tells by
    itself. An edited model that shows more still answers the prompt.
    """
    prompt, empty = setup.model.encode_prompts([target.prompt, ""]).split()

    def rates(cond: Condition) -> list[dict[str, Any]]:
        return [wilson_interval(_completed(setup, target, cond, left)) for left in LEVELS]

    found = {"unedited": rates(prompt), "unprompted": rates(empty)}
    with _edited(setup, edit):
        found["edited"] = rates(prompt)
    grid = sampling_timesteps(DRAW_STEPS)
    return {str(grid[-n]): {k: v[i] for k, v in found.items()} for i, n in enumerate(LEVELS)}


def _completed(setup: EraseSetup, target: Target, cond: Condition, left: int) -> np.ndarray:
    """Hits of real pictures noised to the level that leaves so many steps, and denoised."""
    model, real = setup.model, _real(setup, target)
    x0 = torch.cat([real] * -(-PICTURES // len(real)))[:PICTURES]
    grid = sampling_timesteps(DRAW_STEPS)[-left:]
    noise = _noise(setup, PICTURES)
    x_t = q_sample(x0, noise, model.schedule.level(grid[0]))
    null = model.encode_prompts([""]).expand(PICTURES)
    guided = GuidedDenoiser(model, cond.expand(PICTURES), null, setup.guidance)
    stride = NUM_TRAIN_TIMESTEPS // DRAW_STEPS
    with torch.no_grad():
        for t in grid:
            now, then = model.schedule.level(t), model.schedule.level(t - stride)
            x_t = ddim_step(x_t, guided.eps(x_t, t), now, then)
    return _hits(setup, target, x_t)


def relearning(setup: EraseSetup, target: Target, edit: Edit, selection: str) -> dict[str, Any]:
    """Steps of Adam on the selected weights until the judge sees the concept in half its pictures.

    "edited": the concept's pictures under its own words. "new_word": the same model, another
    object's pictures under a word that it never learned: the speed to compare with. Each: {"steps",
    None where MOST did not do, "rates" [[step, share], ...]}. A model trained without the concept
    would be the stricter comparison; none is at hand here.
    """
    other = next(t for t in setup.targets[target.kind] if t != target)
    with _edited(setup, edit):
        again = _learned(setup, target, target.prompt, selection)
        new = _learned(setup, other, NEW_WORD, selection)
    return {"edited": again, "new_word": new | {"concept": other.name, "word": NEW_WORD}}


def _learned(setup: EraseSetup, target: Target, prompt: str, selection: str) -> dict[str, Any]:
    model, among = setup.model, select(setup.model.network, selection)
    kept = [c.weight.detach().clone() for c in among]
    draws, cond = _batches(setup, _real(setup, target)), model.encode_prompts([prompt])
    adam = torch.optim.Adam([c.weight for c in among], RELEARN_RATE)
    rates: list[list[float]] = []
    try:
        for step in range(MOST + 1):
            if step % EVERY == 0:
                hits = _shown(setup, target, cond, PICTURES)
                rates.append([step, round(float(hits.mean()), 4)])
                if hits.mean() >= SEEN:
                    return {"steps": step, "rates": rates}
            x_t, t, eps, _ = next(draws)
            with requires_grad_only(model.network, among), torch.enable_grad():
                _loss(model, x_t, t, cond.expand(len(x_t)), eps).backward()
                adam.step()
        return {"steps": None, "rates": rates}
    finally:
        with torch.no_grad():
            for c, weight in zip(among, kept, strict=True):
                c.weight.copy_(weight)


def _real(setup: EraseSetup, target: Target) -> torch.Tensor:
    """Latents of the concept's training pictures, at most PICTURES."""
    records = setup.task.train.records
    rows = [i for i, r in enumerate(records) if r[target.kind] == target.name]
    return setup.task.latents[rows[:PICTURES]].to(setup.model.device)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _batches(setup: EraseSetup, x0: torch.Tensor) -> Iterator[Batch]:
    """SHOTS noised pictures at random levels, for ever: x_t, t, eps, places; the same each time."""
    generator, schedule = torch.Generator().manual_seed(FIRST_SEED), setup.model.schedule
    while True:
        places = torch.randint(len(x0), (SHOTS,), generator=generator)
        t = torch.randint(1, NUM_TRAIN_TIMESTEPS, (SHOTS,), generator=generator)
        eps = torch.randn(SHOTS, *x0.shape[1:], generator=generator).to(x0)
        pairs = zip(x0[places], eps, t.tolist(), strict=True)
        x_t = torch.stack([q_sample(x, e, schedule.level(n)) for x, e, n in pairs])
        yield x_t, t, eps, places


def _loss(
    model: Any, x_t: torch.Tensor, t: torch.Tensor, cond: Condition, eps: torch.Tensor
) -> torch.Tensor:
    return (model.eps(x_t, t, cond) - eps).square().mean()


def _noise(setup: EraseSetup, count: int) -> torch.Tensor:
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    return torch.cat([initial_noise(setup.model.latent_shape, s) for s in seeds]).to(
        setup.model.device
    )


def _shown(setup: EraseSetup, target: Target, cond: Condition, count: int) -> np.ndarray:
    """Hits of pictures drawn by the fp32 model as it stands."""
    null = setup.model.encode_prompts([""]).expand(count)
    guided = GuidedDenoiser(setup.model, cond.expand(count), null, setup.guidance)
    return _hits(setup, target, ddim_sample(guided, _noise(setup, count), DRAW_STEPS)[0])


def _hits(setup: EraseSetup, target: Target, x0: torch.Tensor) -> np.ndarray:
    """int [n]: the judge sees the concept."""
    pictures = np.stack([np.asarray(p) for p in setup.model.decode(x0)])
    _, _, chances = setup.judge.predict(resized(pictures, setup.judge.settings.size))
    names = {"object": setup.judge.objects, "style": setup.judge.styles}[target.kind]
    return (chances[target.kind].argmax(1) == names.index(target.name)).astype(int)


@contextmanager
def _edited(setup: EraseSetup, edit: Edit) -> Iterator[None]:
    """The fp32 model under an edit, inside the block."""
    with EditedNetwork(setup.model.network) as edited:
        edited.apply(edit)
        yield
