"""Replay: parts of pictures are those of a literal account and add up to the weights, and a
killed replay goes on to the same bits.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_trak.components.parameter_groups import select
from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from experiments.training.loop import decay_of
from experiments.truth import replay, small_model, train
from experiments.truth.subsets import Subset

TINY = small_model.SmallSettings((8, 8), 4, text_width=6, steps=7, batch=6, warmup=2)
SUBSET = Subset("x", 0, (1,))
CHOSEN = "cross_attention|feed_forward|convolution"


class Bench:
    """A tiny small model whose training can be run again, in its own precision or in fp64."""

    def __init__(self, like, data, work, double):
        self.like, self.train, self.double, self.work = like, data.split("train"), double, work
        images = self.train.images(range(len(self.train)), like.image_size)
        self.latents = like.encode_images(images)
        self.examples = train.examples_of(like, self.train, self.latents, SUBSET)
        run = train.run_of(like, self.train, SUBSET, TINY, work)
        # a rate and a decay at which all terms count; clipping at some steps
        self.run = replace(run, weight_decay=0.3, lr=0.02) if double else run
        taken = functools.partial(train.taken, self.examples, TINY, 0)
        self.training = replay.Training(self.make, taken, self.run, len(self.train))

    def make(self):
        model = small_model.build(self.like, TINY, 0)
        if self.double:
            model.network.double(), model.pipe.text_encoder.double()
            loss = functools.partial(self.loss, model)
        else:
            loss = functools.partial(train.loss_of_step, model, self.examples, TINY, 0)
        chosen = select(model.network, CHOSEN)
        return replay.TrainingCopy(model.network, chosen, small_model.parameters(model), loss)

    def losses(self, model, step):
        """[B] of the batch's samples, without bf16."""
        x0, ids, t, eps = train.draw(self.examples, TINY, 0, step)
        a = train.ALPHA_BAR[t].view(-1, 1, 1, 1).double()
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        states = model.pipe.text_encoder(ids).last_hidden_state
        error = model.network(x_t, t, states).sample - eps
        return 3 * error.square().flatten(1).mean(1) / len(error)

    def loss(self, model, step):
        return self.losses(model, step).sum()

    def direction(self):
        torch.manual_seed(3)
        return {c.name: torch.randn_like(c.weight) for c in self.make().chosen}

    def literally(self, direction):
        """[N] < a, part of picture i >, with a parameter-sized account of every picture."""
        model = small_model.build(self.like, TINY, 0)
        model.network.double(), model.pipe.text_encoder.double()
        params, chosen = small_model.parameters(model), select(model.network, CHOSEN)
        progress = replay.TrainingState(params, self.run)
        shape = (len(self.train),)
        m, theta, ema = (
            {c.name: torch.zeros(*shape, *c.weight.shape).double() for c in chosen}
            for _ in range(3)
        )
        for step in range(self.run.steps):
            losses = self.losses(model, step)
            weights = [c.weight for c in chosen]
            each = [torch.autograd.grad(x, weights, retain_graph=True) for x in losses]
            progress.update(self.loss(model, step))
            group = progress.optimizer.param_groups[0]
            b1, b2 = group["betas"]
            clip = min(1.0, 1 / (progress.norm + 1e-6))
            d = decay_of(self.run.ema_decay, step)
            for k, c in enumerate(chosen):
                g = torch.zeros_like(m[c.name])
                g.index_add_(0, self.training.taken(step), torch.stack([x[k] for x in each]))
                m[c.name] = b1 * m[c.name] + (1 - b1) * clip * g
                v = progress.optimizer.state[c.weight]["exp_avg_sq"] / (1 - b2 ** (step + 1))
                pace = progress.rate / (1 - b1 ** (step + 1)) / (v.sqrt() + group["eps"])
                shrink = 1 - progress.rate * self.run.weight_decay
                theta[c.name] = shrink * theta[c.name] - pace * m[c.name]
                ema[c.name] = d * ema[c.name] + (1 - d) * theta[c.name]
        return np.stack(
            [(ema[c.name] * direction[c.name]).flatten(1).sum(1).numpy() for c in chosen], 1
        )


@pytest.fixture
def bench(tiny_model, tiny_data, tmp_path):
    return functools.partial(Bench, tiny_model, load_folder(tiny_data), tmp_path / "work")


def test_parts_are_those_of_a_literal_account_and_add_up(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "BLOCK", 4)
    made = bench(double=True)
    direction = made.direction()
    mask = {name: (a > 0).to(a) for name, a in direction.items()}
    found = replay.Replay(made.training, direction, tmp_path, [mask]).split()
    assert found.gap().max() < 1e-9 and np.abs(found.rounding).max() < 1e-9
    literal = made.literally(direction)
    np.testing.assert_allclose(found.pictures[0], literal, rtol=1e-7, atol=1e-10)
    positive = made.literally({name: a.clamp_min(0) for name, a in direction.items()})
    np.testing.assert_allclose(found.pictures[1], positive, rtol=1e-7, atol=1e-10)
    assert np.abs(literal).max() > 1e-2 and not literal[1].any()  # the removed one taught nothing


def test_what_lies_beyond_the_look_ahead_is_all_that_is_lost(bench, tmp_path, monkeypatch):
    made = bench(double=True)
    direction = made.direction()
    gaps = []
    for number, (block, ahead) in enumerate([(2, 1), (2, 3), (3, 7)]):
        monkeypatch.setattr(replay, "BLOCK", block)
        monkeypatch.setattr(replay, "LOOKAHEAD", ahead)
        gaps += [replay.Replay(made.training, direction, tmp_path / str(number)).split().gap()[0]]
    assert gaps[0] > gaps[1] > 1e-4 and gaps[2] < 1e-9


def test_a_replay_is_the_training_to_the_bit_and_goes_on_after_a_kill(
    bench, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(replay, "BLOCK", 4)
    made = bench(double=False)
    direction = made.direction()
    whole = replay.Replay(made.training, direction, tmp_path / "whole").split()
    trained = train.train_subset(
        tiny_model, made.train, made.latents, SUBSET, TINY, tmp_path / "trained"
    )
    for name, p in small_model.parameters(trained).items():
        assert torch.equal(p, whole.ema[name])
    assert whole.gap().max() < 1e-5
    assert np.abs(whole.rounding).sum() < 0.02 * np.abs(whole.pictures).sum()  # bf16
    step, calls = replay.Replay._step, []

    def dying(self, u):
        calls.append(self.progress.step)
        if len(calls) == 7:
            raise KeyboardInterrupt
        step(self, u)

    monkeypatch.setattr(replay.Replay, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        replay.Replay(made.training, direction, tmp_path / "killed").split()
    again = replay.Replay(made.training, direction, tmp_path / "killed").split()
    assert calls == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    for field in ("pictures", "rounding", "start", "total"):
        assert np.array_equal(getattr(whole, field), getattr(again, field))
    (sums,) = (tmp_path / "killed").glob("sums-*.npz")
    sums.write_bytes(sums.read_bytes()[:100])
    with pytest.raises(UserError, match="begin the replay anew: rm -r "):
        replay.Replay(made.training, direction, tmp_path / "killed").split()
