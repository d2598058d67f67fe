"""The page stands alone and says only what is known; the results folder has the reference's names
and honest numbers.
"""

import base64
import json
import re
from html import escape, unescape
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from concept_trak.errors import UserError
from concept_trak.report import ConceptResult, write_report, write_results
from concept_trak.report.histogram import format_score, score_unit
from concept_trak.scoring import metrics

NUM, SIDE = 40, 16
DAMPINGS = tuple(0.1 * 10.0**e for e in range(-4, 5))
LAMBDAS = [
    "1.0e-04",
    "1.0e-03",
    "1.0e-02",
    "1.0e-01",
    "1.0e+00",
    "1.0e+01",
    "1.0e+02",
    "1.0e+03",
    "1.0e+04",
]
FIXED = DAMPINGS[2]


class TinyDataset:
    """What the report asks of an ImageCaptionDataset: captions and images(indices, size)."""

    def __init__(self, side=SIDE):
        self.captions = [f"picture {i} of a thing" for i in range(NUM)]
        self.captions[3] = 'a <script>alert("3")</script> & a\ttab\nline'
        self.records = [{"text": caption} for caption in self.captions]
        self.pixels = np.random.default_rng(0).integers(
            0, 256, (NUM, side, side, 3), dtype=np.uint8
        )

    def images(self, indices, size=None):
        pictures = self.pixels[np.asarray(indices)]
        if size in (None, pictures.shape[1]):
            return pictures
        return np.stack(
            [
                np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.LANCZOS))
                for p in pictures
            ]
        )


def concept(target="elephant", seed=0, truth=True):
    rng = np.random.default_rng(seed)
    relevant = rng.random(NUM) < 0.3
    scores = (
        rng.normal(size=(len(DAMPINGS), NUM)) * 1e-6
        + relevant * np.linspace(0, 2e-6, len(DAMPINGS))[:, None]
    )
    scores[:, 3] = 9e-6  # the hostile caption is always on top
    return ConceptResult(target, f"without {target}", scores, DAMPINGS, relevant if truth else None)


def report(path, dataset=None, concepts=None, **changes):
    arguments = {
        "prompt": "an elephant in the style of openmoji",
        "query_image": Image.new("RGB", (SIDE, SIDE), "teal"),
        "concepts": concepts or [concept("elephant", 0), concept("openmoji", 1)],
        "dataset": dataset or TinyDataset(),
        "top_k": 5,
        "settings": {"seed": 0, "guidance": {"train": 7.5}, "note": "<b>bold</b>"},
        "provenance": {"git": "abc123"},
        "fixed_damping": FIXED,
    }
    write_report(path, **{**arguments, **changes})
    return path.read_text(encoding="utf-8")


def results(folder, the_concept=None, **changes):
    arguments = {
        "query_image": Image.new("RGB", (SIDE, SIDE), "teal"),
        "concept": the_concept or concept(),
        "dataset": TinyDataset(),
        "top_k": 5,
        "settings": {"seed": 0},
        "provenance": {"git": "abc123"},
        "render_leastk": False,
        "fixed_damping": FIXED,
    }
    write_results(folder, **{**arguments, **changes})


class Page(HTMLParser):
    """Collects tags with their attributes and what is left open."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(tmp_path):
    html = report(
        tmp_path / "report.html",
        controls={"pixels": [concept("elephant", 5), concept("openmoji", 6)]},
    )
    page = Page(html)
    assert page.open == []
    assert (
        "http:" not in html
        and "https:" not in html
        and "@import" not in html
        and "url(" not in html
    )
    assert not any(tag in ("script", "iframe", "object", "embed") for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointers = {attributes["href"][1:] for tag, attributes in page.tags if tag == "use"}
    assert pointers <= set(ids)


def test_every_caption_score_and_damping_is_shown(tmp_path):
    dataset, concepts = TinyDataset(), [concept("elephant", 0), concept("openmoji", 1)]
    html = report(tmp_path / "report.html", dataset, concepts)
    for d, power in enumerate(["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰", "10¹", "10²", "10³", "10⁴"]):
        assert re.search(rf'<input type="radio" name="damping" id="d{d}"( checked)?>{power}', html)
    for result in concepts:
        for d in range(len(DAMPINGS)):
            unit = score_unit(result.scores[d])
            for index in result.ranked(d, 5) + result.ranked(d, 5, largest=False):
                assert escape(dataset.captions[index]) in html
                assert format_score(float(result.scores[d, index]), unit) in html


def test_cards_follow_the_ranking(tmp_path):
    result = concept()
    html = report(tmp_path / "report.html", concepts=[result])
    for d in range(len(DAMPINGS)):
        top, least = re.findall(rf'<ol class="cards p p{d}">(.*?)</ol>', html, re.S)
        assert [int(i) for i in re.findall(r'href="#i(\d+)"', top)] == result.ranked(d, 5)
        assert [int(i) for i in re.findall(r'href="#i(\d+)"', least)] == np.argsort(
            result.scores[d]
        )[:5].tolist()


def test_hostile_text_is_escaped_everywhere(tmp_path):
    evil = '"><script>x</script>'
    html = report(tmp_path / "report.html", concepts=[concept(evil), concept("b", 1)], prompt=evil, title=evil,
                  controls={evil: [concept(evil), concept("b")]})  # fmt: skip
    assert "<script" not in html and "<b>bold</b>" not in html
    assert Page(html).open == []
    assert unescape(html).count(evil) > 5


def test_truth_is_marked_in_words_only_where_labels_exist(tmp_path):
    known = report(tmp_path / "known.html")
    assert "✓ match" in known and "✗ no match" in known and "oracle" in known and "chance" in known
    unknown = report(
        tmp_path / "unknown.html",
        concepts=[concept(truth=False), concept("openmoji", 1, truth=False)],
    )
    body = unknown.split("</style>")[1]
    for word in (
        "✓",
        "✗",
        "match",
        "oracle",
        "Recall",
        "chance",
        'class="hit"',
        "is-hit",
        'class="tone"',
    ):
        assert word not in body
    assert "fixed" in body


def test_a_concept_no_training_image_carries_counts_as_unknown(tmp_path):
    empty = concept()
    empty.relevant[:] = False
    assert "✗" not in report(tmp_path / "report.html", concepts=[empty])


@pytest.mark.parametrize(
    "unseen, said", [(True, "never saw this pair"), (False, "trained on this pair"), (None, None)]
)
def test_headline_claims_only_what_is_known(tmp_path, unseen, said):
    html = report(tmp_path / "report.html", unseen=unseen)
    assert ("this pair" in html) == (said is not None) and (said or "") in html
    assert "High score: removing this image would weaken the concept" in html


def test_fixed_damping_is_the_one_shown_first_and_oracle_is_named(tmp_path):
    concepts = [concept("elephant", 0)]
    html = report(tmp_path / "report.html", concepts=concepts)
    assert re.findall(r'id="d(\d)" checked', html) == ["2"]
    assert re.search(r'id="d2" checked>10⁻²<small>fixed', html)
    assert re.search(rf'id="d{concepts[0].oracle_index()}"[^<]*(<small>)(fixed<br>)?oracle', html)


def test_oracle_has_the_best_recall():
    result = concept()
    recalls = metrics.recall_at_k(result.scores, result.relevant, 10)
    assert recalls[result.oracle_index()] == recalls.max()
    assert concept(truth=False).oracle_index() is None


def test_each_picture_is_embedded_once_and_exactly(tmp_path):
    dataset = TinyDataset()
    html = report(tmp_path / "report.html", dataset)
    embedded = re.findall(r'<symbol id="i(\d+)".*?href="data:image/webp;base64,([^"]+)"', html)
    assert {int(i) for i, _ in embedded} == {
        int(i) for i in re.findall(r'<use href="#i(\d+)"', html)
    }
    assert len({i for i, _ in embedded}) == len(embedded)
    for index, data in embedded:
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))
        assert np.array_equal(pixels, dataset.pixels[int(index)])


def test_large_pictures_are_shrunk(tmp_path):
    html = report(
        tmp_path / "report.html", TinyDataset(side=300), query_image=Image.new("RGB", (900, 600))
    )
    assert 'viewBox="0 0 128 128"' in html and 'class="photo"' in html
    assert len(html) < 2_000_000


def test_same_arguments_give_same_bytes_and_no_part_is_left(tmp_path):
    for name in ("a", "b"):
        report(tmp_path / name / "report.html")
        results(tmp_path / name, render_leastk=True)
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")
    )
    assert first == second
    assert not any(name.endswith(".part") for name in first)


def test_results_folder_has_the_reference_names(tmp_path):
    results(tmp_path / "top")
    listings = {f"topk-lambda_{x}.jpg" for x in LAMBDAS} | {
        f"topk-prompts-lambda_{x}.txt" for x in LAMBDAS
    }
    assert {p.name for p in (tmp_path / "top").iterdir()} == listings | {
        "query.png",
        "metrics.json",
    }
    results(tmp_path / "both", render_leastk=True)
    both = listings | {name.replace("topk", "leastk") for name in listings}
    assert {p.name for p in (tmp_path / "both").iterdir()} == both | {"query.png", "metrics.json"}


def test_listings_are_tsv_of_the_ranking(tmp_path):
    result, dataset = concept(), TinyDataset()
    results(tmp_path, result, render_leastk=True)
    for end, largest in (("topk", True), ("leastk", False)):
        for d, label in enumerate(LAMBDAS):
            header, *rows = (
                (tmp_path / f"{end}-prompts-lambda_{label}.txt").read_text().splitlines()
            )
            assert header.split("\t") == ["rank", "train|exemplar", "idx", "caption"]
            cells = [row.split("\t") for row in rows]
            indices = result.ranked(d, 5, largest)
            expected = [(str(rank), "train", str(i)) for rank, i in enumerate(indices, start=1)]
            assert [(rank, kind, i) for rank, kind, i, _ in cells] == expected
            assert [caption for *_, caption in cells] == [
                " ".join(dataset.captions[i].split()) for i in indices
            ]


def test_grid_shows_the_pictures(tmp_path):
    dataset, result = TinyDataset(), concept()
    dataset.pixels[3] = (200, 30, 30)
    results(tmp_path, result, dataset=dataset)
    grid = np.asarray(Image.open(tmp_path / "topk-lambda_1.0e+00.jpg").convert("RGB")).astype(int)
    assert (
        np.abs(grid[60:160, 60:160] - (200, 30, 30)).max() < 12
    )  # the red picture is on top at every damping
    assert np.array_equal(np.asarray(Image.open(tmp_path / "query.png"))[0, 0], (0, 128, 128))


def test_metrics_json_equals_the_metrics(tmp_path):
    result = concept()
    results(tmp_path, result)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["lambda"] for row in record["dampings"]] == LAMBDAS
    for row, scores in zip(record["dampings"], result.scores):
        assert row["recall_at_10"] == metrics.recall_at_k(scores, result.relevant, 10)
        assert row["least_10_recall"] == metrics.least_k_recall(scores, result.relevant, 10)
        assert row["average_precision"] == metrics.average_precision(scores, result.relevant)
    assert record["fixed"] == record["dampings"][2]
    assert record["oracle"] in record["dampings"]
    assert record["chance"]["recall_at_10"] == metrics.chance_recall_at_k(
        NUM, record["num_relevant"], 10
    )
    assert record["settings"] == {"seed": 0} and record["provenance"] == {"git": "abc123"}


def test_metrics_json_without_truth_claims_no_recall(tmp_path):
    results(tmp_path, concept(truth=False))
    text = (tmp_path / "metrics.json").read_text()
    assert (
        "recall" not in text
        and "oracle" not in text
        and json.loads(text)["fixed"]["damping"] == pytest.approx(FIXED)
    )


def test_score_units_keep_scores_readable():
    assert score_unit(np.array([0.0, 0.0])) == 0
    assert score_unit(np.array([0.02, -0.4])) == 0
    assert score_unit(np.array([3.2e-6, -1e-7])) == -6
    assert format_score(-3.2e-6, -6) == "−3.20" and format_score(0.4, 0) == "+0.400"


def test_bad_arguments_are_one_clear_line_and_leave_nothing(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(UserError, match="not in the sweep"):
        report(path, fixed_damping=0.5)
    with pytest.raises(UserError, match="TOP_K is 0"):
        report(path, top_k=0)
    with pytest.raises(UserError, match="at least one target"):
        write_report(path, prompt="", query_image=None, concepts=[], dataset=TinyDataset(), top_k=1, settings={}, provenance={},
                     fixed_damping=FIXED)  # fmt: skip
    with pytest.raises(UserError, match="control 'pixels'"):
        report(path, controls={"pixels": [concept("elephant")]})
    short = ConceptResult("cat", "", np.zeros((9, NUM - 1)), DAMPINGS)
    with pytest.raises(UserError, match=f"{NUM - 1} images but the dataset has {NUM}"):
        results(tmp_path / "folder", short)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scores, dampings, relevant, message",
    [
        (np.zeros((2, 3)), (1.0,), None, "have shape"),
        (np.array([[0.0, np.nan]]), (1.0,), None, "training image 1 at damping 1"),
        (np.zeros((2, 3)), (1.0, 1.00001), None, "share a file name"),
        (np.zeros((1, 3)), (1.0,), np.ones(4, bool), "truth of 'cat' is for 4"),
    ],
)
def test_malformed_results_are_refused(scores, dampings, relevant, message):
    with pytest.raises(UserError, match=message):
        ConceptResult("cat", "", scores, dampings, relevant)
