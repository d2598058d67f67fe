"""A benchmark: questions whose answers are known. `evaluate` runs every ranker on it.

To add one, write a class as below under `@BENCHMARKS.register("name")`; then
`run_eval.sh --benchmark name` serves it. `settings` are what its defaults change in those of the
emoji benchmark.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np

from concept_trak.attribution.question import Query
from concept_trak.attribution.task import AttributionTask

TUNE = "tune"  # the split that chooses a damping, and is reported nowhere


class Benchmark(Protocol):
    """Questions, concepts, relevant pictures and splits.

    concepts: the kinds of concept asked about, each reported by itself. kinds: where the queries'
    pictures come from, e.g. "generated"; the first chooses the dampings. splits: those reported.
    """

    concepts: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]]
    splits: ClassVar[tuple[str, ...]]
    settings: ClassVar[dict[str, Any]]

    def __init__(self, task: AttributionTask) -> None: ...

    def questions(self, kind: str) -> dict[str, list[Query]]:
        """{split: questions}, those of `splits` and TUNE; every picture with all `concepts`."""
        ...

    def relevant(self, question: Query) -> np.ndarray:
        """bool [N]: the training images that carry the concept."""
        ...
