"""Exact accounting by replay: which picture put which part of a weight there.

A training here (`experiments.training.loop`) is AdamW on clipped gradients and an average of the
weights.
With its second moments v and clip factors c held at what they were, all of it is linear in the
gradients g_{s,i} of single pictures:

    m_{s+1}     = b1 m_s + (1 - b1) c_s sum_i g_{s,i}
    theta_{s+1} = (1 - r_s l) theta_s - D_s m_{s+1},         r_s: rate, l: weight decay
    ema_{s+1}   = d_s ema_s + (1 - d_s) theta_{s+1}
    D_s         = r_s / (1 - b1^{s+1}) / (sqrt(v_{s+1} / (1 - b2^{s+1})) + eps)

so that for a fixed direction a over weights, with coefficients that the reverse recursion gives,

    < a, ema_T > = k < a, theta_0 > + sum_s sum_i c_s (1 - b1) < q_{s+1}, g_{s,i} >

    e_T = 1,     e_s = d_s e_{s+1}                                    (of ema_s in ema_T)
    p_T = 1 - d_{T-1},   p_s = (1 - d_{s-1}) e_s + (1 - r_s l) p_{s+1}    (of theta_s, d_{-1} = 1)
    q_T = - p_T D_{T-1} a,   q_{s+1} = b1 q_{s+2} - p_{s+1} D_s a         (of m_{s+1})

and k = e_0 + p_0. Decay shrinks every part alike and has none of its own. q at a step needs D of
later ones: a second copy of the training runs AHEAD steps in front and leaves D behind; what lies
further on weighs b1^AHEAD, below the rounding of fp32. Per-picture gradients are read from the
training's own backward pass (`gradients.vjp`), never formed. Where its products are rounded
(bf16), they
do not add up to its gradient to the last bit: the difference is kept as a part, `rounding`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from concept_trak.atomic_io import make_folder, write_bytes
from concept_trak.components.data_influence import ComponentSplitter
from concept_trak.components.parameter_groups import Component
from concept_trak.errors import UserError
from concept_trak.gradients.layer_rules import rule_of
from concept_trak.gradients.sample_grads import OuterProductGrad
from concept_trak.store.array_cache import read_npz
from experiments.training.loop import MAX_NORM, Run, TrainingState, decay_of, learning_rate

LOOKAHEAD = 128  # steps; 0.9^128 = 1.4e-6
BLOCK = 32  # steps between two checkpoints of a replay

Direction = dict[str, torch.Tensor]  # component's name -> values of its shape


@dataclass(frozen=True)
class TrainingCopy:
    """One run of a training from its start. chosen: components of its network. params: all that is
    trained. loss: step -> scalar.
    """

    network: nn.Module
    chosen: Sequence[Component]
    params: dict[str, nn.Parameter]
    loss: Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Training:
    """A seeded training that can be run again to the same bits. make: a fresh `TrainingCopy`.
    taken: step
    -> pictures [B] of its batch, in the order of the network's samples.
    """

    make: Callable[[], TrainingCopy]
    taken: Callable[[int], torch.Tensor]
    run: Run
    num_pictures: int


@dataclass
class Decomposition:
    """< a, ema_T > of M directions over G components, by what put it there; float64.

    pictures [M, N, G]; start [M, G]: of the initial weights; rounding [M, G]: see above; total [M,
    G]: < a, ema_T > itself, computed from the weights; ema: the averaged weights.
    """

    pictures: np.ndarray
    start: np.ndarray
    rounding: np.ndarray
    total: np.ndarray
    ema: dict[str, torch.Tensor]

    def gap(self) -> np.ndarray:
        """[M] |sum of the parts - total|, as a share of the parts' magnitudes together."""
        parts = np.concatenate([self.pictures, self.start[:, None], self.rounding[:, None]], 1)
        size = np.abs(parts).sum((1, 2))
        return np.abs(parts.sum((1, 2)) - self.total.sum(1)) / np.where(size > 0, size, 1)


class Coefficients:
    """e, p and k of the module docstring for every step of a run."""

    def __init__(self, run: Run) -> None:
        steps = run.steps
        rates = [run.lr * learning_rate(s, run.phases, run.warmup) for s in range(steps)]
        decays = [decay_of(run.ema_decay, s) for s in range(steps)]
        e, p = [1.0] * (steps + 1), [0.0] * (steps + 2)
        for s in range(steps, -1, -1):
            if s < steps:
                e[s] = decays[s] * e[s + 1]
            own = (1 - decays[s - 1]) * e[s] if s else 0.0
            shrink = 1 - rates[s] * run.weight_decay if s < steps else 0.0
            p[s] = own + shrink * p[s + 1]
        self.p, self.start = p, e[0] + p[0]


class GradientTape:
    """Per-sample gradients of the chosen weights from a training's own backward pass: hooks that
    keep each layer's input and the gradient of its output, and change neither.
    """

    def __init__(self, copy: TrainingCopy) -> None:
        self.copy = copy
        self._kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block a forward and backward pass are recorded."""
        handles = []
        for component in self.copy.chosen:
            module = self.copy.network.get_submodule(component.name.rpartition(".")[0])
            hook = self._keep(component.name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            (given, *_) = (*args, *kwargs.values())
            a = given.detach().to(output.dtype)  # autocast rounds the input, too

            def keep(delta: torch.Tensor) -> None:  # once for each use of the module
                self._kept.setdefault(name, []).append((a, delta))

            output.register_hook(keep)

        return hook

    def gradients(self) -> Iterator[tuple[Component, OuterProductGrad]]:
        """Of each sample's part of the loss, a component at a time; what is read is let go."""
        for component in self.copy.chosen:
            module = self.copy.network.get_submodule(component.name.rpartition(".")[0])
            rule: Any = rule_of(module)
            dtype = component.weight.dtype
            uses = [
                dict(rule(module, a.to(dtype), delta.to(dtype)))["weight"]
                for a, delta in self._kept.pop(component.name)
            ]
            yield (
                component,
                OuterProductGrad(0, *(torch.cat(x, 1) for x in zip(*uses, strict=True))),
            )


class Replay:
    """Runs a training again and splits < a, ema_T > for a direction a and parts of it.

    masks: M - 1 further directions, a on some weights alone {name: bool}. folder: of the state that
    a killed replay goes on from.
    """

    def __init__(
        self,
        training: Training,
        direction: Direction,
        folder: Path,
        masks: Sequence[Direction] = (),
    ) -> None:
        self.training, self.direction, self.masks = training, direction, masks
        run = replace(training.run, checkpoint=folder / "replay.safetensors", desc="replay")
        self.folder, self.run, self.at = make_folder(folder), run, Coefficients(run)
        self.copy = training.make()
        self.progress = TrainingState(self.copy.params, run)
        groups = len(self.copy.chosen)
        self.pictures = np.zeros((1 + len(masks), training.num_pictures, groups))
        self.rounding = np.zeros((1 + len(masks), groups))
        self.start = self.at.start * self._products(lambda c: c.weight.detach())

    @property
    def memory(self) -> int:
        """Bytes that D and q take beside two copies of the training."""
        size = sum(c.weight.numel() * c.weight.element_size() for c in self.copy.chosen)
        return (LOOKAHEAD + 2 * BLOCK) * size

    def split(self) -> Decomposition:
        """Run to the end, from where an earlier one was killed; see `Decomposition`."""
        self._resume()
        leader = _Leader(self.training.make(), self.run, self.progress.step)
        done, total = self.progress.step, self.run.steps
        with tqdm(total=total, initial=done, desc="replay", unit="step", mininterval=10) as bar:
            while self.progress.step < total:
                first = self.progress.step
                last = min(first + BLOCK, total)
                leader.run_to(min(last + LOOKAHEAD, total))
                for u in self._adjoints(leader.left, first, last):
                    self._step(u)
                    bar.update()
                leader.left = leader.left[last - first :]
                self._save()
        ema = {c.name: self.progress.ema.shadow[self._key(c)] for c in self.copy.chosen}
        found = self._products(lambda c: ema[c.name])
        return Decomposition(
            self.pictures, self.start, self.rounding, found, dict(self.progress.ema.shadow)
        )

    def _key(self, component: Component) -> str:
        (key,) = (k for k, p in self.copy.params.items() if p is component.weight)
        return key

    def _products(self, of: Callable[[Component], torch.Tensor]) -> np.ndarray:
        """[M, G] < a, of > by component."""
        return np.array(
            [
                [float((self._masked(c, k) * of(c)).double().sum()) for c in self.copy.chosen]
                for k in range(1 + len(self.masks))
            ]
        )

    def _masked(self, component: Component, k: int) -> torch.Tensor:
        a = self.direction[component.name]
        return a * self.masks[k - 1][component.name] if k else a

    def _adjoints(
        self, left: list[dict[str, torch.Tensor]], first: int, last: int
    ) -> list[dict[str, torch.Tensor]]:
        """(1 - b1) q_{s+1} of steps first, ..., last - 1, from D of all steps that are `left`."""
        beta = self.progress.optimizer.param_groups[0]["betas"][0]
        found: list[dict[str, torch.Tensor]] = []
        q = {c.name: torch.zeros_like(c.weight) for c in self.copy.chosen}
        for s in range(first + len(left) - 1, first - 1, -1):
            for name, d in left[s - first].items():
                q[name] = beta * q[name] - self.at.p[s + 1] * d * self.direction[name]
            if s < last:
                found.append({name: (1 - beta) * value for name, value in q.items()})
        return found[::-1]

    def _step(self, u: dict[str, torch.Tensor]) -> None:
        """One step of the training; adds its pictures' parts."""
        step, tape = self.progress.step, GradientTape(self.copy)
        with tape.recording():
            self.progress.update(self.copy.loss(step))
        clip = min(1.0, MAX_NORM / (self.progress.norm + 1e-6))
        taken = self.training.taken(step).numpy()
        for g, (component, grad) in enumerate(tape.gradients()):
            whole = component.weight.grad  # of all samples, clipped
            assert whole is not None
            for k in range(1 + len(self.masks)):
                name = component.name
                along = u[name] * self.masks[k - 1][name] if k else u[name]
                parts = ComponentSplitter([component], {name: along}).split(component, grad)[:, 0]
                values = clip * parts.double().cpu().numpy()
                np.add.at(self.pictures[k, :, g], taken, values)
                self.rounding[k, g] += float((along * whole).double().sum()) - values.sum()

    def _save(self) -> None:
        """First the sums under the step's number, then the checkpoint that names it."""
        sums = io.BytesIO()
        np.savez(sums, pictures=self.pictures, rounding=self.rounding)
        write_bytes(self._sums(self.progress.step), sums.getvalue())
        self.progress.save()
        for old in self.folder.glob("sums-*.npz"):
            if old != self._sums(self.progress.step):
                old.unlink()

    def _sums(self, step: int) -> Path:
        return self.folder / f"sums-{step}.npz"

    def _resume(self) -> None:
        self.progress.resume()
        if not self.progress.step:
            return
        path = self._sums(self.progress.step)
        kept = read_npz(path) or {}
        pictures, rounding = kept.get("pictures"), kept.get("rounding")
        if (
            pictures is None
            or rounding is None
            or (pictures.shape, rounding.shape) != (self.pictures.shape, self.rounding.shape)
            or not (np.isfinite(pictures).all() and np.isfinite(rounding).all())
        ):
            folder = os.path.relpath(self.folder)
            raise UserError(f"{path} is missing or damaged; begin the replay anew: rm -r {folder}")
        self.pictures, self.rounding = pictures, rounding


class _Leader:
    """A copy of the training that runs in front. left: D of the steps that it made."""

    def __init__(self, copy: TrainingCopy, run: Run, step: int) -> None:
        self.copy, self.progress = copy, TrainingState(copy.params, run)
        if step:
            self.progress.resume()
        self.left: list[dict[str, torch.Tensor]] = []

    def run_to(self, step: int) -> None:
        """Train up to a step."""
        while self.progress.step < step:
            self.progress.update(self.copy.loss(self.progress.step))
            self.left.append(self._denominators())

    @torch.no_grad()
    def _denominators(self) -> dict[str, torch.Tensor]:
        """D of the last step, as torch's AdamW computes it."""
        progress, group = self.progress, self.progress.optimizer.param_groups[0]
        first, second = (1 - beta**progress.step for beta in group["betas"])
        found = {}
        for c in self.copy.chosen:
            v = progress.optimizer.state[c.weight]["exp_avg_sq"]
            found[c.name] = progress.rate / first / (v.sqrt() / second**0.5 + group["eps"])
        return found
