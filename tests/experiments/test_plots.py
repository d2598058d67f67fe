"""Plots of the tables: names that do not cover each other, in the order of their lines."""

import numpy as np
import pytest

from experiments.benchmark.plots import against_k, kind_of, png, spread_labels


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.0, 1.0, 0.01, 0.99], [0.3]])
def test_names_keep_their_order_a_gap_and_the_panel(values):
    places = spread_labels(np.array(values), gap=0.1)
    order = np.argsort(values, kind="stable")
    assert (np.diff(places[order]) >= 0.1 - 1e-9).all()
    assert places.min() >= -1e-9 and places.max() <= 1 + 1e-9


def test_a_name_with_room_stands_at_its_line():
    np.testing.assert_allclose(spread_labels(np.array([0.2, 0.8])), [0.2, 0.8])


def test_kinds_are_what_rankers_know():
    assert {kind_of(name) for name in ("concept_trak", "reference", "blindfold")} == {"concept"}
    assert {kind_of(name) for name in ("trak", "abu", "nda")} == {"whole picture"}
    assert {kind_of(name) for name in ("random", "caption_similarity", "chance")} == {"control"}


def test_every_line_is_named_in_every_panel():
    of = {"concept_trak": np.ones(5), "concept_trak, global": np.ones(5), "trak": np.zeros(5)}
    figure = against_k({"seen": of, "unseen": of}, "recall")
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [list(of)] * 2
    assert png(figure)[:4] == b"\x89PNG"
