"""A state: what a picture looks like at a noise level, and what the network is told about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from ..models.condition import Condition


@dataclass
class State:
    """b samples at one noise level or at levels of their own.

    t: a number, or [b] on the CPU. x_t [b, ...]. cond: c of b prompts. cond_neg: what c is
    contrasted with, the empty prompt or c-. eps [b, ...]: the noise that belongs to x_t, if it is
    known. x0 [b, ...]: the clean picture, where there is one. known: where a prediction eps(x_t, t,
    cond) is left for an inversion that goes on from x_t.
    """

    t: int | torch.Tensor
    x_t: torch.Tensor
    cond: Condition
    cond_neg: Condition
    eps: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    known: dict[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x_t)

    def contrasting(self, plus: Condition, minus: Condition) -> State:
        """The same state under c+ and c-, of one prompt each."""
        return replace(self, cond=plus.expand(len(self)), cond_neg=minus.expand(len(self)))


def rebatch(states: Iterable[State], batch_size: int) -> Iterator[State]:
    """The samples of `states` in batches of at most `batch_size`, whatever their levels."""
    waiting: list[State] = []
    for state in states:
        waiting += [_sample(state, i) for i in range(len(state))]
        while len(waiting) >= batch_size:
            yield _join(waiting[:batch_size])
            waiting = waiting[batch_size:]
    if waiting:
        yield _join(waiting)


def _sample(state: State, i: int) -> State:
    one, t = slice(i, i + 1), state.t
    return State(
        t if isinstance(t, int) else int(t[i]),
        state.x_t[one],
        state.cond[one],
        state.cond_neg[one],
        None if state.eps is None else state.eps[one],
        None if state.x0 is None else state.x0[one],
    )


def _join(parts: list[State]) -> State:
    def cat(name: str) -> torch.Tensor | None:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else torch.cat(values)

    return State(
        torch.tensor([p.t for p in parts]),
        torch.cat([p.x_t for p in parts]),
        Condition.join([p.cond for p in parts]),
        Condition.join([p.cond_neg for p in parts]),
        cat("eps"),
        cat("x0"),
    )
