"""The page stands alone and says only what is known; the results folder has the reference's names
and honest numbers.
"""

import base64
import csv
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib import resources
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from concept_trak.errors import UserError
from concept_trak.report import ConceptResult, ReportContext, write_report, write_results
from concept_trak.report.context import Links
from concept_trak.report.formatting import damping_name, format_score, rate, score_unit
from concept_trak.report.scores import write_scores
from concept_trak.scoring import metrics

NUM, SIDE = 40, 16
DAMPINGS = tuple(0.1 * 10.0**e for e in range(-4, 5))
LAMBDAS = [f"1.0e{e:+03d}" for e in range(-4, 5)]
FIXED = DAMPINGS[2]


class TinyDataset:
    """What the report asks of an ImageCaptionDataset: captions and images(indices, size)."""

    def __init__(self, side=SIDE):
        self.captions = [f"picture {i} of a thing" for i in range(NUM)]
        self.captions[3] = 'a <script>alert("3")</script> & a\ttab\nline'
        shape = (NUM, side, side, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def images(self, indices, size=None):
        pictures = self.pixels[np.asarray(indices)]
        if size in (None, pictures.shape[1]):
            return pictures
        resized = [Image.fromarray(p).resize((size, size)) for p in pictures]
        return np.stack([np.asarray(p) for p in resized])


def concept(target="elephant", seed=0, truth=True, negative=None):
    rng = np.random.default_rng(seed)
    relevant = rng.random(NUM) < 0.3
    scores = rng.normal(size=(len(DAMPINGS), NUM)) * 1e-6
    scores += relevant * np.linspace(0, 2e-6, len(DAMPINGS))[:, None]
    scores[:, 3] = 9e-6  # the hostile caption is always on top
    negative = f"without {target}" if negative is None else negative
    return ConceptResult(target, negative, scores, DAMPINGS, relevant if truth else None)


def pair():
    return [concept("elephant", 0), concept("openmoji", 1)]


def shown(**changes):
    asked = ReportContext(
        picture=Image.new("RGB", (SIDE, SIDE), "teal"),
        dataset=TinyDataset(),
        top_k=5,
        fixed_damping=FIXED,
        settings={"seed": 0, "guidance": {"train": 7.5}, "note": "<b>bold</b>"},
        provenance={"git": "abc123"},
    )
    return replace(asked, **changes)


def report(path, concepts=None, prompt="an elephant", unseen=None, **changes):
    concepts = pair() if concepts is None else concepts
    write_report(path, prompt, concepts, shown(**changes), unseen=unseen)
    return path.read_text(encoding="utf-8")


def results(folder, the_concept=None, leastk=False, **changes):
    write_results(folder, the_concept or concept(), shown(**changes), render_leastk=leastk)


class Page(HTMLParser):
    """Collects tags with their attributes, all text as a reader gets it, and what is left open."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.texts = [], [], [""]
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts += [*(value for _, value in attributes if value), ""]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.texts.append("")

    def handle_data(self, text):
        self.texts[-1] += text

    def shape(self):
        """What markup there is, whatever the words: tags, and names of their attributes."""
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]


def test_page_is_self_contained_and_well_formed(tmp_path):
    html = report(tmp_path / "report.html")
    page = Page(html)
    assert page.open == []
    assert not any(word in html for word in ("http:", "https:", "@import", "url("))
    assert not any(tag in ("script", "iframe", "object", "embed") for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointers = {attributes["href"][1:] for tag, attributes in page.tags if tag == "use"}
    assert pointers <= set(ids)


def test_style_sheet_is_embedded_as_it_stands(tmp_path):
    style = resources.files("concept_trak.report").joinpath("templates/page.css").read_text("utf-8")
    assert style in report(tmp_path / "report.html")


def test_every_caption_score_and_damping_is_shown(tmp_path):
    dataset, concepts = TinyDataset(), pair()
    html = report(tmp_path / "report.html", concepts, dataset=dataset)
    texts = Page(html).texts
    for d, power in enumerate(
        ["1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10", "100", "1000"]
    ):
        assert re.search(rf'<input type="radio" name="damping" id="d{d}"( checked)?>{power}', html)
    for result in concepts:
        for d in range(len(DAMPINGS)):
            unit = score_unit(result.scores[d])
            for index in result.ranked(d, 5) + result.ranked(d, 5, largest=False):
                assert dataset.captions[index] in texts
                assert f"{format_score(float(result.scores[d, index]), unit)} ×10⁻⁶" in texts


def test_cards_follow_the_ranking(tmp_path):
    result = concept()
    html = report(tmp_path / "report.html", [result])
    for d in range(len(DAMPINGS)):
        top, least = re.findall(rf'<ol class="cards p p{d}">(.*?)</ol>', html, re.S)
        assert [int(i) for i in re.findall(r'href="#i(\d+)"', top)] == result.ranked(d, 5)
        lowest = np.argsort(result.scores[d])[:5].tolist()
        assert [int(i) for i in re.findall(r'href="#i(\d+)"', least)] == lowest


def page_of(path, word):
    """A page with `word(place)` wherever text comes from outside."""
    dataset, places = TinyDataset(), []

    def text(place):
        places.append(word(place))
        return places[-1]

    for index in range(NUM):
        dataset.captions[index] = word(f"caption {index}")
    results = [concept(text(f"target {i}"), i, negative=text(f"negative {i}")) for i in (0, 1)]
    record = {
        text("key"): text("value"),
        text("outer"): {text("inner"): text("nested")},
        "path": text("/data/file"),
        "list": [text("item")],
        "object": type("Thing", (), {"__str__": lambda _: text("str()")})(),
    }
    prompt, settings, provenance = text("prompt"), record, {text("made"): text("by")}
    asked = {"dataset": dataset, "settings": settings, "provenance": provenance}
    html = report(path, results, prompt, unseen=True, **asked)
    return html, places + [dataset.captions[i] for i in results[0].ranked(0, 5)]


def times_said(html, words):
    """How often a reader of the page meets each word; what stands in a list stands as JSON."""
    said = "\n".join(Page(html).texts)
    return [max(said.count(word), said.count(json.dumps(word)[1:-1])) for word in words]


@pytest.mark.parametrize(
    "evil",
    [
        '"><script>alert(1)</script>',
        "' onload='alert(1)' x='",
        '" onmouseover="alert(1)',
        "</title></style></svg><img src=x onerror=alert(1)>",
        "<!-- ",
        "&lt;b&gt; &amp; &#60;",
        "{{ 7 * 7 }}{% raw %}{# ",
        "$prompt ${prompt} %s {0}",
    ],
)
def test_hostile_text_is_only_text_wherever_it_stands(evil, tmp_path):
    html, places = page_of(tmp_path / "evil.html", lambda place: f"{place}{evil}{place}")
    page = Page(html)
    harmless, names = page_of(tmp_path / "good.html", lambda place: f"{place}-{place}")
    assert page.open == [] and page.shape() == Page(harmless).shape()
    counts = times_said(html, places)
    assert counts == times_said(harmless, names) and all(counts)


def test_truth_is_marked_in_words_only_where_labels_exist(tmp_path):
    known = report(tmp_path / "known.html")
    assert "✓ match" in known and "✗ no match" in known and "oracle" in known and "chance" in known
    unlabelled = [concept(truth=False), concept("openmoji", 1, truth=False)]
    body = report(tmp_path / "unknown.html", unlabelled).split("</style>")[1]
    marks = ('class="hit"', 'class="rug"', "is-hit", 'class="tone"')
    for word in ("✓", "✗", "match", "oracle", "Recall", "chance", *marks):
        assert word not in body
    assert "fixed" in body


def test_a_concept_no_training_image_carries_counts_as_unknown(tmp_path):
    empty = concept()
    empty.relevant[:] = False
    assert "✗" not in report(tmp_path / "report.html", [empty])


@pytest.mark.parametrize(
    "unseen, said", [(True, "never saw this pair"), (False, "trained on this pair"), (None, None)]
)
def test_headline_claims_only_what_is_known(tmp_path, unseen, said):
    html = report(tmp_path / "report.html", unseen=unseen)
    assert ("this pair" in html) == (said is not None) and (said or "") in html
    assert "High score: removing this image would weaken the concept" in html


def test_headline_names_the_concepts_in_one_sentence(tmp_path):
    lede = re.search(r'<p class="lede">(.*?)</p>', report(tmp_path / "report.html"), re.S)[1]
    said = " ".join(unescape(re.sub("<[^>]*>", "", lede)).split())
    assert said == (
        "These training images taught the model “elephant”; these taught it “openmoji”."
    )


def test_fixed_damping_is_the_one_shown_first_and_oracle_is_named(tmp_path):
    result = concept("elephant", 0)
    html = report(tmp_path / "report.html", [result])
    assert re.findall(r'id="d(\d)" checked', html) == ["2"]
    assert re.search(r'id="d2" checked>0.001<small>fixed', html)
    assert re.search(rf'id="d{result.oracle_index()}"[^<]*(<small>)(fixed<br>)?oracle', html)


def test_oracle_has_the_best_recall():
    result = concept()
    recalls = metrics.recall_at_k(result.scores, result.relevant, 10)
    assert recalls[result.oracle_index()] == recalls.max()
    assert concept(truth=False).oracle_index() is None


def test_each_picture_is_embedded_once_and_exactly(tmp_path):
    dataset = TinyDataset()
    html = report(tmp_path / "report.html", dataset=dataset)
    symbol = r'<symbol id="i(\d+)"[^>]*>\s*<image [^>]*href="data:image/webp;base64,([^"]+)"'
    embedded = re.findall(symbol, html)
    used = {int(i) for i in re.findall(r'<use href="#i(\d+)"', html)}
    assert {int(i) for i, _ in embedded} == used
    assert len({i for i, _ in embedded}) == len(embedded)
    for index, data in embedded:
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))
        assert np.array_equal(pixels, dataset.pixels[int(index)])


def test_large_pictures_are_shrunk(tmp_path):
    large = {"dataset": TinyDataset(side=300), "picture": Image.new("RGB", (900, 600))}
    html = report(tmp_path / "report.html", **large)
    assert 'viewBox="0 0 128 128"' in html and 'class="photo"' in html
    query = re.search(r'<img class="photo" src="data:image/webp;base64,([^"]+)"', html)[1]
    assert Image.open(BytesIO(base64.b64decode(query))).size == (512, 341)
    assert len(html) < 2_000_000


def test_same_arguments_give_same_bytes_and_no_part_is_left(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        report(folder / "report.html")
        results(folder, leastk=True)
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert first == second
    assert not any(name.endswith(".part") for name in first)


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    path = tmp_path / "report.html"
    path.mkdir()  # no file can take this name
    with pytest.raises(UserError, match=r"cannot write .*report\.html: "):
        report(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["report.html"]


def test_results_folder_has_the_reference_names(tmp_path):
    top = {f"topk-lambda_{x}.jpg" for x in LAMBDAS}
    top |= {f"topk-prompts-lambda_{x}.txt" for x in LAMBDAS} | {"query.png", "metrics.json"}
    results(tmp_path / "top")
    assert {p.name for p in (tmp_path / "top").iterdir()} == top
    results(tmp_path / "both", leastk=True)
    both = top | {name.replace("topk", "leastk") for name in top}
    assert {p.name for p in (tmp_path / "both").iterdir()} == both


def test_listings_are_tsv_of_the_ranking(tmp_path):
    result, dataset = concept(), TinyDataset()
    results(tmp_path, result, leastk=True)
    for end, largest in (("topk", True), ("leastk", False)):
        for d, label in enumerate(LAMBDAS):
            table = (tmp_path / f"{end}-prompts-lambda_{label}.txt").read_text()
            header, *rows = [line.split("\t") for line in table.splitlines()]
            assert header == ["rank", "train|exemplar", "idx", "caption", "score"]
            captions = [" ".join(caption.split()) for caption in dataset.captions]
            ranked = enumerate(result.ranked(d, 5, largest), start=1)
            scored = [(rank, i, f"{result.scores[d, i]:.6e}") for rank, i in ranked]
            assert rows == [[str(r), "train", str(i), captions[i], score] for r, i, score in scored]


def test_rows_after_the_train_rows_are_exemplars_counted_from_zero(tmp_path):
    result = concept()
    write_results(tmp_path, result, shown(top_k=NUM), render_leastk=False, num_train=30)
    table = (tmp_path / "topk-prompts-lambda_1.0e+00.txt").read_text().splitlines()[1:]
    places = [tuple(row.split("\t")[1:3]) for row in table]
    expected = [("train", i) if i < 30 else ("exemplar", i - 30) for i in result.ranked(4, NUM)]
    assert places == [(kind, str(i)) for kind, i in expected]


def test_grid_shows_the_pictures(tmp_path):
    dataset, result = TinyDataset(), concept()
    dataset.pixels[3] = (200, 30, 30)
    results(tmp_path, result, dataset=dataset)
    grid = np.asarray(Image.open(tmp_path / "topk-lambda_1.0e+00.jpg").convert("RGB")).astype(int)
    # the red picture is on top at every damping
    assert np.abs(grid[60:160, 60:160] - (200, 30, 30)).max() < 12
    assert np.array_equal(np.asarray(Image.open(tmp_path / "query.png"))[0, 0], (0, 128, 128))


def test_metrics_json_equals_the_metrics(tmp_path):
    result = concept()
    results(tmp_path, result)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["lambda"] for row in record["dampings"]] == LAMBDAS
    for row, scores in zip(record["dampings"], result.scores, strict=True):
        assert row["recall_at_10"] == metrics.recall_at_k(scores, result.relevant, 10)
        assert row["least_10_recall"] == metrics.least_k_recall(scores, result.relevant, 10)
        assert row["average_precision"] == metrics.average_precision(scores, result.relevant)
    assert record["fixed"] == record["dampings"][2]
    assert record["oracle"] == record["dampings"][result.oracle_index()]
    chance = metrics.chance_recall_at_k(NUM, record["num_relevant"], 10)
    assert record["chance"]["recall_at_10"] == chance
    assert record["settings"] == shown().settings and record["provenance"] == {"git": "abc123"}


def test_metrics_json_without_truth_claims_no_recall(tmp_path):
    results(tmp_path, concept(truth=False))
    text = (tmp_path / "metrics.json").read_text()
    assert "recall" not in text and "oracle" not in text
    assert json.loads(text)["fixed"]["damping"] == pytest.approx(FIXED)


def test_score_units_keep_scores_readable():
    assert score_unit(np.array([0.0, 0.0])) == 0
    assert score_unit(np.array([0.02, -0.4])) == 0
    assert score_unit(np.array([3.2e-6, -1e-7])) == -6
    assert format_score(-3.2e-6, -6) == "−3.20" and format_score(0.4, 0) == "+0.400"


def test_small_rates_and_odd_dampings_keep_their_digits():
    assert [rate(x) for x in (0, 0.5, 0.005, 0.0004)] == ["0.00", "0.50", "0.01", "0.0004"]
    assert [damping_name(x) for x in DAMPINGS[:5]] == ["1e-05", "0.0001", "0.001", "0.01", "0.1"]


def test_bad_arguments_are_one_clear_line_and_leave_nothing(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(UserError, match="not in the sweep"):
        report(path, fixed_damping=0.5)
    with pytest.raises(UserError, match="TOP_K=0 shows"):
        report(path, top_k=0)
    with pytest.raises(UserError, match="at least one target"):
        report(path, [])
    other = ConceptResult("cat", "", np.zeros((1, NUM)), (0.1,))
    with pytest.raises(UserError, match="'cat' and 'elephant' have different dampings"):
        report(path, [concept(), other])
    short = ConceptResult("cat", "", np.zeros((9, NUM - 1)), DAMPINGS)
    with pytest.raises(UserError, match=f"{NUM - 1} images but the dataset has {NUM}"):
        report(path, [short])
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


# --- results as data


class Labelled(TinyDataset):
    """With records, as a folder on disk has them."""

    def __init__(self):
        super().__init__()
        self.records = [
            {"file_name": f"pictures/{i} #.png", "object": "cat" if i % 2 else "dog"}
            for i in range(NUM)
        ]


def test_scores_csv_and_npy_hold_every_picture_in_the_order_of_the_ranking(tmp_path):
    result, data = concept(), Labelled()
    rival = np.arange(NUM, dtype=np.float32)[None]
    write_scores(tmp_path, result, shown(dataset=data), {"das": rival})
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), result.scores)
    np.testing.assert_array_equal(np.load(tmp_path / "scores-das.npy"), rival)
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == result.ranked(2, NUM)
    assert [int(row["rank"]) for row in rows] == list(range(1, NUM + 1))
    for row in rows:
        i = int(row["index"])
        assert float(row["score"]) == pytest.approx(result.scores[2, i], rel=1e-6)
        lower = (result.scores[2] < result.scores[2, i]).mean() * 100
        assert float(row["percentile"]) == pytest.approx(lower, abs=0.01)
        assert row["caption"] == data.captions[i] and row["object"] == data.records[i]["object"]
        assert row["file_name"] == data.records[i]["file_name"]
        assert row["match"] == str(int(result.relevant[i]))
    assert "style" not in rows[0] and "fit" not in rows[0]


def test_cards_and_scores_are_linked_where_files_are_known(tmp_path):
    links = Links(lambda i: f"../own/{i}%20a.png", {"elephant": {"scores.csv": "t/scores.csv"}})
    page = Page(report(tmp_path / "report.html", [concept()], links=links))
    hrefs = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {f"../own/{i}%20a.png" for i in concept().ranked(2, 5)} <= set(hrefs)
    assert "t/scores.csv" in hrefs and page.open == []
    assert "<a " not in report(tmp_path / "alone.html", [concept()])
