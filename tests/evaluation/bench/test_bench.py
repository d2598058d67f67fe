"""The benchmark: its literal reference is the oracle of recipe `reference`; its flags and its
arithmetic.
"""

import dataclasses
import json

import numpy as np
import pytest

from concept_trak import cli
from concept_trak.attribution.train_grad import train_states
from concept_trak.errors import UserError
from concept_trak.evaluation.bench import command as bench
from concept_trak.evaluation.bench import engine as bench_engine
from concept_trak.evaluation.bench import literal_reference
from concept_trak.rows import featurize, query
from concept_trak.rows.projection import make_projection
from concept_trak.rows.vjp import PerSampleVjp
from concept_trak.settings import REFERENCE, resolve


@pytest.fixture(scope="module")
def inputs(tiny_pipeline, tiny_data):
    settings = resolve(
        "emoji",
        {
            "recipe": "reference",
            "sd_model_path": str(tiny_pipeline),
            "data_dir": str(tiny_data),
            "proj_dim": 200,
            "prompt": "a cat in the style of blob",
            "target_concepts": "cat",
        },
    )
    return bench_engine.load_inputs(settings, 2)


def test_recipe_reference_on_the_engine_equals_the_reference_computed_literally(inputs):
    got, want = (
        bench_engine.engine_rows(inputs)().numpy(),
        bench_engine.literal_rows(inputs)().numpy(),
    )
    assert got.shape == (2, 200) and np.abs(want).max() > 0
    assert bench_engine.row_error(got, want) < 1e-3


def test_the_literal_reference_keeps_nine_states_of_49_steps(inputs):
    steps, eps = [], inputs.model.eps
    counted = type(
        "Counted",
        (),
        {
            "alpha_bar": inputs.model.alpha_bar,
            "eps": lambda self, x, t, c: steps.append((len(x), t)) or eps(x, t, c),
        },
    )()
    states = literal_reference.invert(counted, inputs.x0, inputs.cond, inputs.cond_null, 7.5)
    assert [t for t, _ in states] == list(range(99, 900, 100))
    assert len(steps) == 49 and {n for n, _ in steps} == {4}


def test_a_literal_query_equals_the_engine_on_the_same_states(inputs):
    """One draw without noise: the sampler's state after 5 s steps, and the slider gradient there."""
    s, model = inputs.settings, inputs.model
    literal = literal_reference.query_row(
        model,
        inputs.x_T,
        inputs.cond_plus,
        inputs.cond_minus,
        inputs.cond_null,
        layer=s.layer,
        draws=(9, 4),
        scale=1.0,
        eta=0.0,
        proj_dim=200,
        proj_seed=0,
    )
    projection = make_projection(
        "random_mask", PerSampleVjp(model.network, s.layer).input_dim, 200, 0
    )
    states = query.QueryStates(
        "seed", 1, tuple(query.trajectory_timesteps(10, 50)[i - 1] for i in (9, 4)), eta=0.0
    )
    read = query.read_states(model, states, inputs.cond_prompt, inputs.cond_null, x_T=inputs.x_T)
    ours = query.concept_gradient(
        model, projection, read, inputs.cond_plus, inputs.cond_minus, layer=s.layer, normalize=True
    )
    assert bench_engine.row_error(ours.numpy(), literal.numpy()) < 1e-3


def test_recipe_reference_uses_the_reference_states(inputs):
    assert train_states(inputs.settings) == featurize.reference_states(10, 7.5)


def test_bench_takes_its_own_flags_and_every_setting():
    arguments = cli.parser().parse_args(
        [
            "bench",
            "--n=100",
            "--k=8",
            "--images=3",
            "--repeats=2",
            "--workdir=x",
            "--max-memory=1GB",
            "--epochs=4",
        ]
    )
    assert (arguments.n, arguments.k, arguments.images, arguments.repeats, arguments.workdir) == (
        100,
        8,
        3,
        2,
        "x",
    )
    assert cli.settings_of(arguments).epochs == 4 and cli.settings_of(arguments).max_memory == "1GB"


@pytest.mark.parametrize("flag", ["--n=0", "--k=-1", "--images=0", "--repeats=0"])
def test_numbers_below_one_are_refused(flag, capsys):
    assert cli.main(["bench", flag]) == 2
    assert capsys.readouterr().err.startswith("error: --images")


def test_scoring_from_disk_ends_with_one_json_object(tmp_path, capsys):
    assert cli.main(["bench", "--n=60", "--k=32", f"--workdir={tmp_path}", "--num-queries=2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n"], result["k"], result["num_queries"]) == (60, 32, 2) and result[
        "own_row_first"
    ] == 1.0
    assert result["scoring_speedup"] > 0 and result["max_rel_error"] < 1e-4


def test_the_whole_benchmark_ends_with_one_json_object_of_the_promised_numbers(monkeypatch, capsys):
    seconds = {
        "literal_rows": 8.0,
        "reference_rows": 4.0,
        "default_rows": 1.0,
        "literal_query": 9.0,
        "reference_query": 18.0,
        "default_query": 4.0,
    }
    monkeypatch.setattr(
        bench_engine,
        "time_in_turn",
        lambda cases, images, rounds: {
            c: [(seconds[c], np.ones((2, 3)), 0.5, 0.2)] * rounds for c in cases
        },
    )
    monkeypatch.setattr(
        bench,
        "bench_scores",
        lambda *_: {
            "scoring_speedup": 100.0,
            "scoring_speedup_spread": [90.0, 110.0],
            "peak_rss_gib": 1.0,
        },
    )
    assert cli.main(["bench", "--repeats=2", "--epochs=2", "--nfe=5", "--f=dsm"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["reference_speedup"], result["default_speedup"], result["scoring_speedup"]) == (
        2.0,
        8.0,
        100.0,
    )
    assert result["query_speedup"] == 1.0  # 9 gradients in 9 s against 2 draws x 9 states in 18 s
    assert result["default_query_speedup"] == 2.0  # ... against 2 draws x 4 states in 4 s
    assert result["reference_max_rel_error"] == 0 and result["spread"]["default_speedup"] == [
        8.0,
        8.0,
    ]
    assert set(result["peak_gib"]) == {*seconds, "scoring"} and result[
        "added_gib"
    ] == dict.fromkeys(seconds, 0.2)
    assert result["provenance"]["versions"]["torch"]
    assert (
        result["settings"]["reference"]["f"] == "dps"
        and result["settings"]["default"]["f"] == "dsm"
    )  # a reference is not to be tuned


def test_ratios_are_taken_within_rounds():
    slow, fast = [(4.0,), (8.0,), (9.0,)], [(2.0,), (4.0,), (3.0,)]
    assert bench_engine.speedup(slow, fast) == (2.0, [2.0, 3.0])
    assert bench_engine.speedup(slow, fast, 10)[0] == 20.0


def test_cases_are_timed_in_turn_in_processes_of_their_own(inputs):
    settings = dataclasses.replace(
        inputs.settings, **{**REFERENCE, "nfe": 2, "ddim_inversion": False}
    )
    answers = bench_engine.time_in_turn({"default_rows": settings}, 2, 2)
    (seconds, rows, peak, added), again = answers["default_rows"]
    assert seconds > 0 and 0 <= added < peak < 8 and rows.shape == (2, 200)
    np.testing.assert_array_equal(rows, again[1])


def test_a_mistake_in_a_timed_process_reaches_the_user(inputs):
    with pytest.raises(UserError, match="no_such_layer"):
        bench_engine.time_in_turn(
            {"default_rows": dataclasses.replace(inputs.settings, layer="no_such_layer")}, 2, 1
        )
