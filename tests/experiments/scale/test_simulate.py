"""The simulated cluster: every row ends in the store, and what is made twice is what was torn."""

import numpy as np
import pytest

from experiments.scale.cluster_simulation import HOUR, SimulatedRun, Simulation, simulate

SMALL = SimulatedRun(rows=200_000, workers=64, piece_rows=100, row_seconds=1.0, node_workers=4)
NEVER = 1e12


def test_without_failures_a_run_takes_what_its_rows_take():
    outcome = simulate(SimulatedRun(**vars(SMALL) | {"node_hours": NEVER, "spread": 0.0}))
    pieces = 200_000 / 100
    assert outcome.makespan == pytest.approx(np.ceil(pieces / 64) * 100)
    assert (outcome.recomputed, outcome.lost, outcome.attempts) == (0, 0, 1)


def test_failures_lose_no_row_and_tear_half_a_piece_a_worker():
    """A node of four workers that fails in the middle of things tears four half pieces."""
    plan = SimulatedRun(
        **vars(SMALL) | {"node_hours": 2.0, "notice_seconds": 15, "repair_seconds": 60}
    )
    outcomes = [simulate(plan, seed) for seed in range(8)]
    failures = sum(o.node_failures for o in outcomes)
    drivers = sum(o.driver_failures for o in outcomes)
    torn = 4 * failures + 64 * drivers
    assert failures > 20 and all(o.lost == 0 for o in outcomes)
    assert sum(o.recomputed for o in outcomes) == pytest.approx(50 * torn, rel=0.25)
    assert all(o.makespan >= plan.ideal_seconds for o in outcomes)


def test_every_piece_is_committed_once_and_by_a_worker_that_lived():
    run = Simulation(SimulatedRun(**vars(SMALL) | {"node_hours": 1.0}), np.random.default_rng(0))
    outcome = run.run()
    assert all(run.committed) and sum(run.sizes) == 200_000
    assert outcome.attempts > 1 and outcome.makespan < 3 * HOUR


def test_the_same_seed_is_the_same_run():
    assert simulate(SMALL, 3) == simulate(SMALL, 3) != simulate(SMALL, 4)
