"""What a question costs: samples that went through the network, counted while it is answered.

A forward of one sample counts 1, a backward of one sample 1 (to the activations; weight gradients
of cross-attention add a few per cent). Counted is what a question needs by itself; what all share,
the rows of the train pictures or the curvature, is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from concept_trak.attribution.question import Query
from concept_trak.gradients.vjp import PerSampleVjp


class Count:
    """samples: forwards and backwards of one sample, so far."""

    samples = 0


@contextlib.contextmanager
def counted(network: nn.Module) -> Iterator[Count]:
    """Count what goes through a network inside the block."""
    count = Count()

    def went(module: nn.Module, args: tuple, output: Any) -> None:
        made = output if isinstance(output, torch.Tensor) else output[0]
        count.samples += len(made)
        if made.requires_grad:
            made.register_hook(lambda grad: _add(count, len(grad)))

    handle = network.register_forward_hook(went)
    try:
        yield count
    finally:
        handle.remove()


def _add(count: Count, samples: int) -> None:
    count.samples += 0 if PerSampleVjp.holding else samples


def count_forwards(ranker: Any, question: Query) -> int:
    """Forward equivalents of one question; 0 for a ranker that asks no network."""
    if not hasattr(ranker, "ask"):
        return 0
    ranker.prepare()
    with counted(ranker.task.model.network) as count:
        ranker.ask(question)
    return count.samples
