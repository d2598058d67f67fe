"""The training loop: AdamW under a piecewise cosine, an average of the weights, resume.

    lr_s  = lr min(1, (s + 1) / warmup) peak (0.05 + 0.95 (1 + cos(pi (s - s_0) / length)) / 2)
    ema_s = ema_{s-1} + (1 - d_s) (theta_s - ema_{s-1}),      d_s = min(decay, (1 + s) / (10 + s))

for step s of a phase that begins at s_0 (Loshchilov & Hutter 2017). A checkpoint (safetensors with
a JSON state) appears under its name only when complete. The random stream of step s is seeded by
(seed, s), so that a killed run, continued, comes to the same bits. A checkpoint says what made it,
and is refused by any other run.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from concept_trak.atomic_io import write_bytes
from concept_trak.errors import UserError, remove_hint
from concept_trak.settings import short_hash
from concept_trak.validated_io import parse_json, read_safetensors, refuse_misfits

LOG_EVERY = 50  # steps
MAX_NORM = 1.0  # of a gradient
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one training step; the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def running_mean(mean: float | None, value: float) -> float:
    """Of the losses so far, over some 50 steps; None before the first."""
    return value if mean is None else 0.98 * mean + 0.02 * value


def tensor_hash(tensors: Iterable[torch.Tensor]) -> str:
    """sha256 over the values of tensors, in their order, for `Run.made_from`."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Tensors and a JSON state as one safetensors file. UserError for a disk that is full."""
    whole = {k: v.detach().contiguous() for k, v in tensors.items()}
    state = state | {"sha256": tensor_hash(whole[name] for name in sorted(whole))}
    # one entry: safetensors writes several in any order
    write_bytes(path, save(whole, metadata={"state": json.dumps(state)}))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inverse of `save_checkpoint`. UserError when the file is not one of its, or was changed."""
    mend = remove_hint(path)
    tensors = read_safetensors(path, mend)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    state = parse_json(metadata.get("state", ""), f"the state of {path}", mend, dict)
    step, mean, made = (state.get(key) for key in ("step", "mean", "identity"))
    right = (type(step) is int and step > 0 or step is None, isinstance(mean, float | None))
    if not all(right) or not isinstance(made, dict | None):
        raise UserError(f"the checkpoint {path} is damaged (its state); {mend}")
    # one that was written before digests were kept has none
    found = tensor_hash(tensors[k] for k in sorted(tensors))
    if state.pop("sha256", found) != found:
        raise UserError(f"the checkpoint {path} is damaged (checksum differs); {mend}")
    return tensors, state


def check_same_run(wanted: dict[str, Any], found: dict[str, Any], path: Path, remedy: str) -> None:
    """UserError naming what differs when `path` was made from something else."""
    keys = wanted.keys() | found.keys()
    if different := sorted(k for k in keys if wanted.get(k) != found.get(k)):
        raise UserError(f"{path} was made from another {', '.join(different)}; {remedy}")


def decay_of(bound: float, step: int) -> float:
    """d_s of the module docstring."""
    return min(bound, (1 + step) / (10 + step))


class Ema:
    """Exponential moving average of parameters, of the module docstring."""

    def __init__(self, params: dict[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = {k: p.detach().clone() for k, p in params.items()}

    def update(self, params: dict[str, torch.Tensor], step: int) -> None:
        """Move towards the parameters after `step`."""
        decay = decay_of(self.decay, step)
        new = [p.detach() for p in params.values()]
        torch._foreach_lerp_([self.shadow[k] for k in params], new, 1 - decay)

    @torch.no_grad()
    def copy_to(self, params: dict[str, torch.Tensor]) -> None:
        """Put the averaged weights into the parameters."""
        for name, p in params.items():
            p.copy_(self.shadow[name])


@dataclass(frozen=True)
class LrPhase:
    """A stretch of a run: `steps` steps of a cosine that would take `length` to come down."""

    steps: int
    length: int
    max_weight: float = 1.0  # bound of the loss weight min(1 / abar_t, max_weight)
    peak: float = 1.0  # learning rate at its start, as a fraction of the run's


def phase_of(step: int, phases: tuple[LrPhase, ...]) -> tuple[LrPhase, int]:
    """(phase of a step, first step of that phase)."""
    start = 0
    for phase in phases:
        if step < start + phase.steps:
            return phase, start
        start += phase.steps
    return phases[-1], start - phases[-1].steps


def phases_until(step: int, phases: tuple[LrPhase, ...]) -> list[dict[str, float]]:
    """The phases as far as the first `step` steps went, as JSON; what comes after may change."""
    kept, left = [], step
    for phase in phases:
        if left > 0:
            kept.append(asdict(replace(phase, steps=min(phase.steps, left))))
        left -= phase.steps
    return kept


def learning_rate(step: int, phases: tuple[LrPhase, ...], warmup: int) -> float:
    """Fraction of the run's rate: linear warm-up, then in every phase a cosine from its peak
    towards a twentieth of it.
    """
    phase, start = phase_of(step, phases)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - start) / phase.length))
    return min(1.0, (step + 1) / warmup) * phase.peak * (0.05 + 0.95 * cosine)


@dataclass(frozen=True)
class Run:
    """How to train; made_from: what the loss depends on, as JSON: another is another run."""

    checkpoint: Path  # .safetensors; the losses go beside it as .jsonl
    phases: tuple[LrPhase, ...]
    lr: float
    warmup: int  # steps
    ema_decay: float
    save_every: int  # steps
    weight_decay: float = 0.0
    desc: str = "train"
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)


class TrainingState:
    """Parameters, their average and AdamW's moments after `step` steps. mean: of the loss. norm: of
    the last step's gradient, before it was clipped to MAX_NORM.
    """

    def __init__(self, params: dict[str, torch.nn.Parameter], run: Run) -> None:
        self.params, self.run, self.ema = params, run, Ema(params, run.ema_decay)
        self.optimizer = torch.optim.AdamW(
            params.values(), run.lr, (0.9, 0.99), weight_decay=run.weight_decay, fused=True
        )
        self.step, self.mean, self.rate, self.norm = 0, None, 0.0, 0.0
        self.begun, self.log = time.time(), run.checkpoint.with_suffix(".jsonl")

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"param/{k}": p for k, p in self.params.items()}
        tensors |= {f"ema/{k}": p for k, p in self.ema.shadow.items()}
        for name, p in self.params.items():
            tensors |= {f"{key}/{name}": self.optimizer.state[p][key] for key in MOMENTS}
        made = identity_of(self.run, self.params, self.step)
        state = {"step": self.step, "mean": self.mean, "identity": made}
        save_checkpoint(self.run.checkpoint, tensors, state)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the checkpoint, if there is one. UserError when it is of another run."""
        path = self.run.checkpoint
        if path.exists():
            tensors, state = load_own(self.run, self.params)
            self.step, self.mean = state["step"], state.get("mean")
            for name, p in self.params.items():
                p.copy_(tensors[f"param/{name}"])
                self.ema.shadow[name].copy_(tensors[f"ema/{name}"])
                # in the memory format that AdamW gives them: steps are slower in another
                moments = {k: torch.empty_like(p).copy_(tensors[f"{k}/{name}"]) for k in MOMENTS}
                self.optimizer.state[p] = moments | {"step": torch.tensor(float(self.step))}
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        # what came after the checkpoint comes again
        write_bytes(self.log, "".join(lines[: self.step // LOG_EVERY]).encode())

    def update(self, loss: torch.Tensor) -> None:
        """One step of AdamW on a scalar loss. FloatingPointError when that is not finite."""
        run, value = self.run, loss.item()
        if not math.isfinite(value):
            remedy = f"lower the learning rate and resume from {run.checkpoint}"
            raise FloatingPointError(f"{run.desc}: loss is {value} at step {self.step}; {remedy}")
        self.rate = run.lr * learning_rate(self.step, run.phases, run.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.norm = float(torch.nn.utils.clip_grad_norm_([*self.params.values()], MAX_NORM))
        self.optimizer.step()
        self.ema.update(self.params, self.step)
        self.mean, self.step = running_mean(self.mean, value), self.step + 1

    def write_line(self) -> None:
        """The running mean of the loss, under the log's other lines."""
        line = {"step": self.step, "loss": round(self.mean, 6), "lr": self.rate}
        line["seconds"] = round(time.time() - self.begun, 1)
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def identity_of(run: Run, params: Mapping[str, torch.Tensor], step: int) -> dict[str, Any]:
    """What the weights after so many steps depend on."""
    shapes = {name: list(p.shape) for name, p in params.items()}
    own = {k: getattr(run, k) for k in ("lr", "warmup", "ema_decay", "weight_decay")}
    phases = {"phases": phases_until(step, run.phases)}
    return own | phases | {"parameters": short_hash(shapes)} | run.made_from


def load_own(
    run: Run, params: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The checkpoint of a run. UserError for one of another run, another seed say, or with other
    tensors than those of its parameters.
    """
    path = run.checkpoint
    tensors, state = load_checkpoint(path)
    wanted = identity_of(run, params, state.get("step") or 0)
    check_same_run(wanted, state.get("identity") or {}, path, remove_hint(path))
    kinds = ("param", "ema", *MOMENTS)
    like = {f"{kind}/{name}": p for kind in kinds for name, p in params.items()}
    refuse_misfits(tensors, like, path, remove_hint(path))
    return tensors, state


@torch.no_grad()
def load_averages(run: Run, params: Mapping[str, torch.Tensor]) -> bool:
    """Put the averaged weights of a run that has ended into its parameters; False where it has
    not. UserError as `load_own`.
    """
    if not run.checkpoint.exists():
        return False
    tensors, state = load_own(run, params)
    if state.get("step") != run.steps:
        return False
    for name, p in params.items():
        p.copy_(tensors[f"ema/{name}"])
    return True


def run_training(
    params: dict[str, torch.nn.Parameter], loss_of_step: Callable[[int], torch.Tensor], run: Run
) -> Ema:
    """Train the parameters in place through all phases, from a checkpoint if there is one.

    loss_of_step: step -> scalar. Returns the averaged weights. UserError when the checkpoint is of
    another run, FloatingPointError on a loss that is not finite.
    """
    progress = TrainingState(params, run)
    progress.resume()
    done, total = progress.step, run.steps
    bar = tqdm(range(done, total), desc=run.desc, initial=done, total=total, mininterval=10)
    for step in bar:
        progress.update(loss_of_step(step))
        if progress.step % LOG_EVERY == 0:
            bar.set_postfix(loss=f"{progress.mean:.4f}")
            progress.write_line()
        if progress.step % run.save_every == 0 or progress.step == total:
            progress.save()
    return progress.ema
