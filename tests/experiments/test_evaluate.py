"""The evaluation: which queries, which damping, what the controls know, and one run of everything
on the tiny model.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from concept_trak import cli
from concept_trak.attribution import baselines
from concept_trak.attribution.attributors import GradientAttributor
from concept_trak.attribution.methods import GradientMethod
from concept_trak.attribution.question import Query, generate
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.unlearning import AbU
from concept_trak.gradients.objectives import Objective
from concept_trak.registry import BENCHMARKS, OBJECTIVES, RANKERS
from concept_trak.settings import DAMPINGS, resolve
from concept_trak.store.store import Store
from experiments.benchmark import evaluate
from experiments.benchmarks import Emoji


@pytest.fixture(scope="module")
def settings(tiny_pipeline, tiny_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    return {
        "sd_model_path": str(tiny_pipeline),
        "data_dir": str(tiny_data),
        "grad_dir": str(root / "grads"),
        "results_dir": str(root / "results/qual"),
        "proj_type": "random_mask",
        "proj_dim": 32,
        "nfe": 3,
        "epochs": 1,
        "num_split": 1,
        "gen_num_inference_steps": 5,
        "num_queries": 1,
    }


@pytest.fixture(scope="module")
def task(settings):
    return AttributionTask(resolve("emoji", settings), "cpu")


def test_cells_that_choose_the_damping_are_asked_about_nowhere_else(task):
    rows = {name: set(cells) for name, cells in Emoji(task).cells.items()}
    assert [len(rows[n]) for n in ("ood", "id", "tune")] == [1, 1, 8]
    assert not rows["tune"] & rows["id"] and not rows["tune"] & rows["ood"]


def test_each_split_asks_about_the_cells_it_names(task):
    """Held-out cells under ood, train cells under id and tune, each with both its concepts."""
    benchmark, records = Emoji(task), task.everything.records
    split_of = {r["text"]: r["split"] for r in records}
    for kind in benchmark.kinds:
        for split, questions in benchmark.questions(kind).items():
            wanted = "held_out" if split == "ood" else "train"
            assert {split_of[q.picture.prompt] for q in questions} == {wanted}
            concepts = [q.concept for q in questions]
            assert concepts == ["object", "style"] * (len(questions) // 2)
            assert all(q.words in q.picture.prompt for q in questions)


def test_relevant_pictures_carry_the_concept_that_is_asked_about(task):
    benchmark = Emoji(task)
    for question in benchmark.questions("real")["tune"]:
        shown = np.array([question.words in caption for caption in task.train.captions])
        assert (benchmark.relevant(question) == shown).all() and shown.any()


def test_a_generated_query_and_a_real_one_are_different_pictures_of_one_prompt(task):
    benchmark = Emoji(task)
    made, real = (benchmark.questions(kind)["ood"][0].picture for kind in benchmark.kinds)
    assert made.prompt == real.prompt and made.x_T is not None and real.x_T is None
    assert (made.pixels != real.pixels).any() and made.source != real.source
    shown = task.everything.images([benchmark.cells["ood"][0]], size=8)[0]
    assert (real.pixels == shown).all()


def test_the_chosen_damping_is_the_best_on_average_over_concepts():
    relevant = np.zeros((1, 2, 40), bool)
    relevant[..., :10] = True
    values = np.zeros((3, 1, 2, 40))
    values[0, :, 0, :10] = 1  # finds the first concept only
    values[0, :, 1, 10:] = 1
    values[1, :, :, :9] = 1  # finds nearly all of both
    values[2, :, :, 20:] = 1
    assert evaluate.choose_damping(values, relevant) == 1


def test_among_dampings_within_a_standard_error_the_largest_is_chosen():
    relevant = np.zeros((4, 2, 40), bool)
    relevant[..., :10] = True
    hits = [
        [10, 10, 8, 8],
        [10, 9, 8, 8],
        [10, 8, 8, 7],
        [0, 0, 0, 0],
    ]  # of ten, by damping and cell: means 9, 8.75, 8.25, 0; error 0.58
    values = np.zeros((4, 4, 2, 40))
    for d, row in enumerate(hits):
        for cell, n in enumerate(row):
            values[d, cell, :, 10 - n : 20 - n] = 1
    assert evaluate.choose_damping(values, relevant) == 1


def test_caption_overlap_is_the_share_of_the_concepts_words():
    captions = ["a red cat in the style of blob", "a dog", "a cat"]
    assert baselines.caption_overlap("a red cat", captions).tolist() == [1.0, 0.0, 0.5]


def test_distances_are_euclidean():
    x, y = (
        np.random.default_rng(0).standard_normal((2, 5)),
        np.random.default_rng(1).standard_normal((3, 5)),
    )
    assert np.allclose(baselines.distances(x, y), np.linalg.norm(x[:, None] - y[None], axis=2))


def test_evaluation_prints_the_table_and_one_json_line_and_a_second_run_says_the_same(
    settings, capsys
):
    flags = [
        "evaluate",
        "--device=cpu",
        *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items()),
    ]
    assert cli.main(flags) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    for concept in ("object", "style"):
        for method in ("concept_trak", "trak", "d_trak", "das"):
            entry = first["ood"][concept][method]
            assert (
                0 <= entry["recall_at_10"] <= 1
                and entry["ci95"][0] <= entry["recall_at_10"] <= entry["ci95"][1]
            )
        assert 0 < first["ood"][concept]["chance"]["recall_at_10"] <= 1
    assert first["damping"] in DAMPINGS and {"id", "real", "dampings"} <= first.keys()
    made = Path(settings["results_dir"]) / "eval/latest"
    assert Image.open(made / "recall.png").size[0] > 1200  # a panel a split and concept
    assert cli.main(flags) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first


def test_methods_can_be_chosen_and_unknown_ones_are_named(settings, capsys):
    flags = [
        "evaluate",
        "--device=cpu",
        *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items()),
    ]
    assert cli.main([*flags, "--methods=concept_trak"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["ood"]["style"]) == {
        "concept_trak",
        "pixel_neighbours",
        "latent_neighbours",
        "caption_similarity",
        "judge_features",
        "random",
        "chance",
    }
    assert cli.main([*flags, "--methods=concept_trak,tracin"]) == 2
    assert "METHODS names 'tracin'" in capsys.readouterr().err


def test_a_step_is_chosen_on_tune_questions_and_costs_are_counted(settings, capsys):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    methods = "--methods=abu,grad_dot,ekfac"
    assert cli.main(["evaluate", "--device=cpu", methods, *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps"].keys() == {"abu"} and found["steps"]["abu"] in AbU.candidates
    assert found["dampings"].keys() == {"ekfac"}
    cost = found["forwards_per_query"]
    assert cost["grad_dot"] == cost["ekfac"] == 2 * 2  # one draw, two levels, there and back
    assert cost["abu"] == 2 * 2 + 2 * 11 and cost["random"] == 0


class Stepped:
    """Finds what is asked at its second candidate only, and notes what it is asked."""

    candidates = (0.1, 1.0, 10.0)

    def __init__(self, relevant, step=0):
        self.relevant, self.step, self.asked = relevant, step, []

    def at(self, candidate):
        other = Stepped(self.relevant, candidate)
        other.asked = self.asked
        return other

    def rank(self, questions):
        self.asked.append((self.step, list(questions)))
        right = np.stack([self.relevant[q] for q in questions]).astype(np.float32)
        return (right if self.step == 1 else -right)[None]


def test_a_step_is_chosen_on_tune_alone_and_only_it_is_asked_what_is_reported():
    questions = evaluate.QuerySet.__new__(evaluate.QuerySet)
    questions.asked, questions.concepts = list(range(6)), ("object",)
    questions._split = np.array(["ood", "tune", "tune", "ood", "tune", "ood"])
    questions._concept = np.array(["object"] * 6)
    questions.relevant = np.random.default_rng(0).permuted(
        np.arange(40)[None].repeat(6, 0) < 10, axis=1
    )
    ranker = Stepped(questions.relevant)
    step = evaluate.choose_step(ranker, questions)
    assert step == 1 and all(asked == [1, 2, 4] for _, asked in ranker.asked)
    ranker.asked.clear()
    values = evaluate.score_queries(ranker.at(step), questions)
    assert ranker.asked == [(1, [0, 3, 5])] and values.shape == (1, 6, 40)
    assert (values[0, [0, 3, 5]] == questions.relevant[[0, 3, 5]]).all()


@pytest.fixture
def stored(task, monkeypatch):
    """settings changes -> (query rows of concept_trak, number of rows that were computed)."""
    computed, row = [], GradientAttributor.row
    monkeypatch.setattr(
        GradientAttributor, "row", lambda self, q: computed.append(q) or row(self, q)
    )

    def rows(**changes):
        computed.clear()
        own = task.with_settings(task.settings.but(**changes))
        ranker = RANKERS.get("concept_trak")(own)
        questions = Emoji(own).questions("generated")["ood"]
        return GradientMethod("concept_trak")._stored_rows(ranker, questions), len(computed)

    return rows


def test_query_rows_are_computed_once_and_kept(stored):
    first, _ = stored()
    again, computed = stored()
    assert computed == 0 and (again == first).all()


@pytest.mark.parametrize(
    "change",
    [{"negative_prompt": "a tree"}, {"seed": 1}, {"epochs": 2}, {"gen_guidance_scale": 2.0}],
    ids=str,
)
def test_query_rows_of_other_pictures_or_states_are_not_taken_for_these(change, stored):
    first, _ = stored()
    other, computed = stored(**change)
    assert computed == len(other) and (other != first).any()


def test_the_batch_size_does_not_make_query_rows_stale(stored):
    stored()
    assert stored(batch_size=3)[1] == 0


def test_a_kept_row_names_device_and_torch_version(task):
    question = Emoji(task).questions("generated")["ood"][0]
    known = GradientAttributor(task).identity(question)
    assert known["device"] == "cpu" and known["torch"] == torch.__version__
    assert {"rows", "model", "projection", "tokens", "states"} <= known.keys()


class Constant:
    """A ranker that finds what its benchmark marks: scores are pixel 0 of each train picture."""

    def __init__(self, task):
        self.task = task

    def rank(self, questions):
        shown = self.task.train.images(range(len(self.task.train)), size=8)
        return np.repeat(shown[None, None, :, 0, 0, 0], len(questions), 1).astype(np.float32)


class Dark:
    """A benchmark whose pictures carry a concept when their first pixel is bright."""

    concepts = ("bright",)
    kinds = ("generated",)
    splits = ("all",)
    settings = {"num_queries": 2}

    def __init__(self, task):
        self.task = task

    def questions(self, kind):
        s, prompts = self.task.settings, ["a cat in the style of blob", "a dog"]
        pictures = generate(self.task.model, s, prompts[: s.num_queries], 0)
        asked = [Query(p, "bright", p.prompt, "", "bright") for p in pictures]
        return {"all": asked, "tune": asked}

    def relevant(self, question):
        shown = self.task.train.images(range(len(self.task.train)), size=8)[:, 0, 0, 0]
        return shown >= np.sort(shown)[-3]


def doubled(denoiser, state):
    """A toy objective: grad of ||eps_hat||^2, whose rows are weighted by their losses."""
    eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
    return eps_hat, 2 * eps_hat.detach()


def test_a_new_objective_ranker_and_benchmark_are_served_without_touching_the_library(
    settings, capsys
):
    own = {k: v for k, v in settings.items() if k != "num_queries"}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in own.items()]
    toy = Objective(doubled, row_weight=lambda losses, among: losses)
    with (
        OBJECTIVES.temporary("toy", toy),
        RANKERS.temporary("constant", Constant),
        BENCHMARKS.temporary("dark", Dark),
    ):
        chosen = ["--benchmark=dark", "--methods=constant,concept_trak", "--f=toy"]
        assert cli.main(["evaluate", "--device=cpu", *chosen, *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["queries"] == {"all": 2, "tune": 2}
    table = found["all"]["bright"]
    assert table["constant"]["recall_at_10"] == 1 and table["constant"]["least_10_recall"] < 1
    assert found["dampings"].keys() == {"concept_trak"} and "caption_similarity" in table
    (store,) = Path(own["grad_dir"]).glob("attn2-toy-*")
    assert len(Store.open(store).losses()) == len(Store.open(store).rows(range(11)))
