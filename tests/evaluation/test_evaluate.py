"""The evaluation: which queries, which damping, what the controls know, and one run of everything
on the tiny model.
"""

import json

import numpy as np
import pytest

from concept_trak import cli
from concept_trak.attribution.corpus import Corpus
from concept_trak.evaluation import controls, evaluate
from concept_trak.settings import DAMPINGS, resolve


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


def test_cells_that_choose_the_damping_are_asked_about_nowhere_else(settings):
    groups = evaluate.choose_cells(Corpus(resolve("emoji", settings), "cpu"))
    rows = {name: {cell.row for cell in cells} for name, cells in groups.items()}
    assert [len(groups[n]) for n in ("ood", "id", "tune")] == [1, 1, 8]
    assert not rows["tune"] & rows["id"] and not rows["tune"] & rows["ood"]


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
    assert controls.overlap("a red cat", captions).tolist() == [1.0, 0.0, 0.5]


def test_distances_are_euclidean():
    x, y = (
        np.random.default_rng(0).standard_normal((2, 5)),
        np.random.default_rng(1).standard_normal((3, 5)),
    )
    assert np.allclose(controls.distances(x, y), np.linalg.norm(x[:, None] - y[None], axis=2))


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
        "chance",
    }
    assert cli.main([*flags, "--methods=concept_trak,tracin"]) == 2
    assert "METHODS names 'tracin'" in capsys.readouterr().err
