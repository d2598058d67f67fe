"""Timing in turn: processes of their own, their errors and deaths, ratios and peak memory."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from concept_trak.errors import UserError
from concept_trak.parsing import parse_memory
from experiments.scale import timing

MAKE = partial(partial, torch.full, (2, 3))  # MAKE(v)() is work that returns [2, 3] of v


def test_each_round_asks_every_case_in_a_process_of_its_own(capsys):
    started = time.perf_counter()
    answers = timing.time_in_turn({"a": partial(MAKE, 1.0), "b": partial(MAKE, 2.0)}, 2)
    took = time.perf_counter() - started
    found = [(case, a.result.tolist()) for case, of in answers.items() for a in of]
    assert found == [("a", [[1.0] * 3] * 2)] * 2 + [("b", [[2.0] * 3] * 2)] * 2
    assert 0 < sum(a.seconds for of in answers.values() for a in of) < took
    assert all(0 <= a.added_gib < a.peak_gib < 8 for of in answers.values() for a in of)
    told = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["warm-up", "round 1", "round 2"]


@pytest.mark.parametrize(
    "make, word", [(partial(parse_memory, "much"), "much"), (partial(os._exit, 1), "of a died")]
)
def test_a_mistake_or_a_death_in_a_timed_process_reaches_the_user(make, word):
    with pytest.raises(UserError, match=word):
        timing.time_in_turn({"a": make}, 1)


def test_ratios_are_taken_within_rounds():
    slow, fast = [4.0, 8.0, 9.0], [2.0, 4.0, 3.0]
    assert timing.ratio(slow, fast) == (2.0, [2.0, 3.0])
    assert timing.ratio(slow, fast, 10)[0] == 20.0


def test_the_peak_counts_from_a_restart_and_does_not_begin_with_the_parents():
    lines = (
        "from experiments.scale.timing import peak_rss_gib, restart_peak_rss",
        "a = bytearray(300 << 20)",
        "peak = peak_rss_gib()",
        "del a",
        "print(peak, restart_peak_rss())",
    )
    held = bytearray(500 << 20)
    child = [sys.executable, "-c", "\n".join(lines)]
    told = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    peak, after = map(float, told.split())
    assert len(held) and 0.3 < peak < timing.peak_rss_gib() and after < peak - 0.25
