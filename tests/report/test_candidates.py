"""What is said where an index was searched: the candidates only, and that they are candidates."""

import csv
import json

import numpy as np
import pytest
from test_report import DAMPINGS, FIXED, NUM, Labelled, Page, concept, report, results, shown

from concept_trak.errors import UserError
from concept_trak.report.scores import write_scores
from concept_trak.scoring.candidate_result import CandidateResult

TOLD = "Found by an index; it finds 0.97 [0.94, 0.99] of the ten highest."


def searched(**changes):
    """The result of `concept` where an index found the ten pictures of either end and some more."""
    whole = concept()
    ends = [whole.ranked(d, 10, up) for d in range(len(DAMPINGS)) for up in (True, False)]
    rows = np.unique(np.concatenate(ends))
    sampled = np.arange(0, NUM, 4)
    given = {
        "rows": rows,
        "num_rows": NUM,
        "sampled": sampled,
        "sampled_scores": whole.scores[:, sampled],
        "told": TOLD,
    }
    scores = whole.scores[:, given["rows"]]
    return CandidateResult("elephant", "", scores, DAMPINGS, whole.relevant, **given | changes)


def test_both_ends_are_those_of_all_scores():
    whole, found = concept(), searched()
    assert len(found.rows) < NUM  # else nothing is tested
    for d in range(len(DAMPINGS)):
        for largest in (True, False):
            ranked = whole.ranked(d, 10, largest)
            assert found.ranked(d, 10, largest) == ranked
            np.testing.assert_array_equal(found.scores_of(d, ranked), whole.scores[d, ranked])


def test_what_needs_all_scores_is_not_there():
    found = searched()
    assert found.quality() is None and found.chance() is None and found.oracle_index() is None
    left_out = next(i for i in range(NUM) if i not in found.rows)
    with pytest.raises(KeyError, match="no candidate"):
        found.scores_of(0, [left_out])


def test_the_files_hold_candidates_and_percentiles_of_the_sample(tmp_path):
    found, data = searched(), Labelled()
    write_scores(tmp_path, found, shown(dataset=data), {})
    assert not (tmp_path / "scores.npy").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "candidates.npy"), found.scores)
    np.testing.assert_array_equal(np.load(tmp_path / "candidates-rows.npy"), found.rows)
    with open(tmp_path / "scores.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    d = DAMPINGS.index(FIXED)
    assert [int(row["index"]) for row in listed] == found.ranked(d, NUM)
    for row in listed:
        lower = (found.sampled_scores[d] < np.float32(row["score"])).mean() * 100
        assert float(row["percentile"]) == pytest.approx(lower, abs=100 / len(found.sampled))
        assert row["caption"] == data.captions[int(row["index"])]
        assert row["rank"] == ""  # of all pictures it is not known
    scores, ends = concept().scores, {"rows": np.arange(NUM), "num_rows": NUM}
    spread = {"sampled": np.arange(NUM), "sampled_scores": scores}
    every = CandidateResult("elephant", "", scores, DAMPINGS, **ends, **spread)
    write_scores(tmp_path, every, shown(dataset=data), {})
    with open(tmp_path / "scores.csv", newline="") as file:
        ranks = [(int(row["rank"]), int(row["index"])) for row in csv.DictReader(file)]
    assert ranks == [*enumerate(concept().ranked(d, NUM), 1)]


def test_page_and_metrics_say_which_search_it_was_and_how_well_it_finds(tmp_path):
    results(tmp_path / "target", searched(), leastk=True)
    record = json.loads((tmp_path / "target/metrics.json").read_text())
    assert record["search"] == TOLD and record["num_train"] == NUM
    assert "recall_at_10" not in record["fixed"] and "oracle" not in record
    text = " ".join(Page(report(tmp_path / "report.html", [searched()])).texts)
    assert TOLD in text and "of a random sample" in text
    assert "10 drawn by chance from the 40 training images" in " ".join(text.split())
    whole = " ".join(Page(report(tmp_path / "whole.html", [concept()])).texts)
    assert TOLD not in whole and "random sample" not in whole


@pytest.mark.parametrize(
    "changes",
    [{"rows": np.arange(3)}, {"num_rows": 3}],
    ids=["another number of rows", "rows beyond the last"],
)
def test_candidates_that_do_not_fit_are_refused(changes):
    with pytest.raises(UserError):
        searched(**changes)
