"""The benchmark: its literal reference is the oracle of recipe `reference`; its flags and its
arithmetic; and a whole run of it.
"""

import json
import os
import pickle
import time

import numpy as np
import pytest

from concept_trak import cli
from concept_trak.attribution.naming import train_timesteps
from concept_trak.errors import UserError
from concept_trak.flags import settings_of
from concept_trak.gradients.objectives import concept_cotangent
from concept_trak.gradients.states import (
    QueryStart,
    QueryTimesteps,
    query_states_of,
    reference_states,
    trajectory_timesteps,
)
from concept_trak.settings import ROOT, resolve
from experiments.scale import command as bench
from experiments.scale import gradient_speed as bench_engine
from experiments.scale.timing import TimedCall, timed


@pytest.fixture(scope="module")
def toy(tiny_pipeline, tiny_data):
    """Settings of the tiny pipeline and data."""
    return {
        "sd_model_path": str(tiny_pipeline),
        "data_dir": str(tiny_data),
        "proj_dim": 200,
        "prompt": "a cat in the style of blob",
        "target_concepts": "cat",
    }


@pytest.fixture(scope="module")
def inputs(toy):
    return bench_engine.load_inputs(resolve("emoji", {"recipe": "reference", **toy}), 2)


def test_recipe_reference_on_the_engine_equals_the_reference_computed_literally(inputs):
    got = bench_engine.engine_rows(inputs)().numpy()
    want = bench_engine.literal_rows(inputs)().numpy()
    assert got.shape == (2, 200) and np.abs(want).max() > 0
    assert bench_engine.row_error(got, want) < 1e-3


def test_the_literal_reference_keeps_nine_states_of_49_steps(inputs, monkeypatch):
    steps, eps = [], inputs.model.eps

    def counted(x, t, cond):
        steps.append((len(x), t))
        return eps(x, t, cond)

    monkeypatch.setattr(inputs.model, "eps", counted)
    states = bench_engine.literal(inputs).invert(inputs.x0, inputs.cond, 7.5)
    assert [t for t, _ in states] == list(range(99, 900, 100))
    assert len(steps) == 49 and {n for n, _ in steps} == {4}


def test_a_literal_query_equals_the_engine_on_the_same_states(inputs):
    """Draws without noise: the sampler's state after 5 s steps, and the slider gradient there."""
    model, draws, contrast = inputs.model, (9, 4), (inputs.cond_plus, inputs.cond_minus)
    literal = bench_engine.literal(inputs).query_row(inputs.x_T, *contrast, draws, 1.0, 0.0)
    levels = trajectory_timesteps(10, 50)
    states = QueryTimesteps("seed", 1, tuple(levels[i - 1] for i in draws), eta=0.0)
    conds = inputs.cond_prompt, inputs.cond_null
    read = query_states_of(model, states, QueryStart(inputs.x_T), *conds)
    asked = (state.contrasting(*contrast) for state in read)
    ours = bench_engine.row_maker(inputs).mean_row(asked, concept_cotangent("dps"))
    assert bench_engine.row_error(ours.numpy(), literal.numpy()) < 1e-3


def test_recipe_reference_uses_the_reference_states(inputs):
    assert train_timesteps(inputs.settings) == reference_states(10, 7.5)


def test_bench_takes_its_own_flags_and_every_setting():
    own = {"n": 100, "k": 8, "images": 3, "repeats": 2, "workdir": "x"}
    flags = [f"--{name}={value}" for name, value in own.items()]
    arguments = cli.parser().parse_args(["bench", *flags, "--max-memory=1GB", "--epochs=4"])
    assert {name: getattr(arguments, name) for name in own} == own
    given = settings_of(arguments)
    assert (given.epochs, given.max_memory) == (4, "1GB")


@pytest.mark.parametrize("flag", ["--n=0", "--k=-1", "--images=0", "--repeats=0"])
def test_numbers_below_one_are_refused(flag, capsys):
    assert cli.main(["bench", flag]) == 2
    assert capsys.readouterr().err.startswith("error: --images")


def test_scoring_from_disk_ends_with_one_json_object(tmp_path, capsys):
    assert cli.main(["bench", "--n=60", "--k=32", f"--workdir={tmp_path}", "--num-queries=2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n"], result["k"], result["num_queries"]) == (60, 32, 2)
    assert result["own_row_first"] == 1.0
    assert result["scoring_speedup"] > 0 and result["max_rel_error"] < 1e-4


def files_of_the_checkout():
    """{path: (size, time of change)} of what is no code, and what else lies beside it."""
    folders = [ROOT / name for name in ("data", "experiments", "docs", "scripts")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    return found | {p: None for p in ROOT.iterdir() if not p.name.startswith(".")}


def in_this_process(cases, rounds):
    """As `time_in_turn`, without its processes: each of them imports for ten seconds."""
    works = {case: pickle.loads(pickle.dumps(make))() for case, make in cases.items()}
    found = {case: [timed(work) for _ in range(rounds)] for case, work in works.items()}
    return {c: [TimedCall(s, rows.numpy(), 2.0, 1.0) for s, rows in of] for c, of in found.items()}


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_run_measures_what_it_reports_and_leaves_the_checkout_alone(
    toy, tmp_path, monkeypatch, capsys, processes
):
    monkeypatch.setattr(bench, "SCORING_SIZE", (60, 32))
    monkeypatch.chdir(tmp_path)
    if not processes:
        monkeypatch.setattr(bench_engine, "time_in_turn", in_this_process)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in toy.items()]
    before, started = files_of_the_checkout(), time.perf_counter()
    assert cli.main(["bench", "--images=2", "--repeats=1", *flags]) == 0
    took = time.perf_counter() - started
    assert files_of_the_checkout() == before and not os.listdir(tmp_path)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    each = result["seconds_each"]  # of one round, so these are the seconds of every ratio
    assert each.keys() == bench_engine.CASES.keys() and min(each.values()) > 0
    assert 2 * sum(each[case] for case in each if case.endswith("_rows")) < took
    for name, (slow, fast) in bench_engine.RATIOS.items():
        assert result[name] == pytest.approx(each[slow] / each[fast])
        assert result["spread"][name] == [result[name]] * 2
    assert result["reference_max_rel_error"] < 1e-3 and result["scoring"]["max_rel_error"] < 1e-4
    for case, added in result["added_gib"].items():
        assert 0 <= added < result["peak_gib"][case] < 8


def test_a_speedup_is_that_of_one_gradient_and_a_reference_is_not_tuned(monkeypatch, capsys):
    seconds = dict(zip(bench_engine.CASES, (8.0, 4.0, 1.0, 9.0, 18.0, 4.0), strict=True))

    def fake(cases, rounds):
        return {c: [TimedCall(seconds[c], np.ones((2, 3)), 0.5, 0.2)] * rounds for c in cases}

    speed = {"scoring_speedup": 100.0, "scoring_speedup_spread": [90.0, 110.0]}
    monkeypatch.setattr(bench_engine, "time_in_turn", fake)
    monkeypatch.setattr(bench, "score", lambda *_, **__: speed | {"peak_rss_gib": 1.0})
    assert cli.main(["bench", "--repeats=2", "--epochs=2", "--nfe=5", "--f=dsm"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ratios = {name: result[name] for name in result["spread"]}
    assert ratios == {
        "reference_speedup": 2.0,
        "default_speedup": 8.0,
        "query_speedup": 1.0,  # 9 gradients in 9 s against 2 draws x 9 states in 18 s
        "default_query_speedup": 2.0,  # ... against 2 draws x 4 states in 4 s
        "scoring_speedup": 100.0,
    }
    assert result["reference_max_rel_error"] == 0
    assert result["spread"]["default_speedup"] == [8.0, 8.0]
    assert set(result["peak_gib"]) == {*seconds, "scoring"}
    assert result["added_gib"] == dict.fromkeys(seconds, 0.2)
    assert result["provenance"]["versions"]["torch"]
    assert {r: s["f"] for r, s in result["settings"].items()} == {
        "reference": "dps",
        "default": "dsm",
    }


@pytest.mark.parametrize("case", ["default_rows", "default_query", "literal_rows"])
def test_a_mistake_in_the_settings_is_told_when_a_case_is_made_or_run(inputs, case):
    wrong = inputs.settings.but(layer="no_such_layer")
    with pytest.raises(UserError, match="no_such_layer"):
        bench_engine.make_work(case, wrong, 2)()
