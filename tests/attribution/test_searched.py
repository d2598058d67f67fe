"""A prompt answered by an index is answered as by a scan, and says so; the rest is refused."""

import json

import numpy as np
import pytest

from concept_trak import cli
from concept_trak.attribution.answer import answer
from concept_trak.attribution.index_search import build_index
from concept_trak.attribution.preflight import check_question
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.train_grad import open_store, train_grad
from concept_trak.errors import UserError
from concept_trak.flags import settings_of
from concept_trak.report.explorer import answers_in, explore
from concept_trak.report.write import write_answer
from concept_trak.settings import resolve

pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'concept-trak[index]'")


@pytest.fixture(scope="module")
def task(tiny_pipeline, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    given = {
        "sd_model_path": str(tiny_pipeline),
        "data_dir": str(tiny_data),
        "grad_dir": str(folder / "grads"),
        "results_dir": str(folder / "results"),
        "prompt": "a cat in the style of line",
        "target_concepts": "cat|line",
        "nfe": 2,
        "epochs": 1,
        "num_split": 2,
        "proj_dim": 64,
        "gen_num_inference_steps": 3,
        "search": "index",
    }
    return AttributionTask(resolve("emoji", given), "cpu")


def test_an_index_answers_as_a_scan_does_and_the_page_tells_which(task, capsys):
    settings = task.settings
    with pytest.raises(UserError, match="no train gradients"):
        build_index(task)
    train_grad(task.with_settings(settings.but(shards="0")))
    with pytest.raises(UserError, match=r"has no index; make it: .*build.index"):
        check_question(settings)
    index = build_index(task)
    assert "1 shards of the rows are not finished" in capsys.readouterr().out
    train_grad(task)
    index = build_index(task)
    assert not index.missing() and (index.folder / "recall.json").exists()
    check_question(settings)
    from concept_trak.service.response_schema import AnswerSerializer  # wants the extra `serve`

    found = answer(task)
    whole = answer(task.with_settings(settings.but(search="scan")))
    for one, other in zip(found.concepts, whole.concepts, strict=True):
        for d in range(len(one.dampings)):
            for largest in (True, False):
                assert one.ranked(d, 3, largest) == other.ranked(d, 3, largest)
        np.testing.assert_allclose(one.scores, other.scores[:, one.rows], rtol=1e-5)
        assert "Found by an index" in one.told and not other.told
    page = write_answer(found, settings)
    assert "Found by an index" in page.read_text()
    assert json.loads((page.parent / "question.json").read_text())["search"] == "index"
    told = AnswerSerializer(task, open_store(task)).told(page.parent, "none")
    for concept, one in zip(told["concepts"], found.concepts, strict=True):
        d = one.damping_index(settings.damping)
        assert [card["index"] for card in concept["top"]] == one.ranked(d, settings.top_k)
        assert concept["search"] == one.told and concept["files"]["npy"].endswith("candidates.npy")
    ([kept], wrong) = answers_in([page.parent.parent])
    assert kept.asked["search"] == "index" and not wrong
    assert explore(settings) is None  # the explorer wants every score
    assert "knows its candidates' scores only" in capsys.readouterr().out


NEED_ALL_SCORES = {"evaluate": [], "evaluate-tasks": [], "truth": ["--test=lds"]}
NEED_ALL_SCORES |= {"labelled": ["--benches=synthetic"], "small-abc": []}


@pytest.mark.parametrize("verb", NEED_ALL_SCORES)
def test_what_needs_all_scores_refuses_an_index_before_anything_is_loaded(verb):
    line = [verb, *NEED_ALL_SCORES[verb]]
    with pytest.raises(UserError, match=f"{verb} needs the scores of all pictures.*SEARCH=scan"):
        settings_of(cli.parser().parse_args([*line, "--search=index"]))
    assert settings_of(cli.parser().parse_args(line))


def test_other_methods_refuse_an_index(task):
    with pytest.raises(UserError, match="METHODS=das needs the scores of all pictures"):
        check_question(task.settings.but(methods="das"))
