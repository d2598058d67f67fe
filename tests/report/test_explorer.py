"""The explorer in a real browser: opens, filters, compares, by keyboard alone, on a phone; it asks
nobody for anything, and 10,000 pictures keep nobody waiting.
"""

import dataclasses
import json
import shutil
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from concept_trak.attribution.answer import AttributionResult
from concept_trak.attribution.question import Query, QueryImage
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.report.explorer import explore, write_explorer
from concept_trak.report.saved_answer import answers_in
from concept_trak.report.sprites import PER, SpriteSheets
from concept_trak.report.write import write_answer
from concept_trak.scoring.result import ConceptResult
from concept_trak.settings import DAMPINGS, as_dict, resolve

OBJECTS, STYLES = ("cat", "dog", "tree", "boat"), ("blob", "line", "flat")
EVIL = (
    "</script><script>document.title = 'evil'</script><img src=x onerror=\"document.title='evil'\">"
)
PAINT = 2000  # ms to the first paint of 10,000 pictures


def pictures(root, n, side=16, files=24):
    """n rows over some files of one colour each, labelled object x style."""
    (root / "art").mkdir(parents=True)
    names = [f"art/picture {i} #{i}.png" for i in range(files)]
    for i, name in enumerate(names):
        Image.new("RGB", (side, side), (10 * i % 256, 80, 200)).save(root / name)
    records = [
        {"file_name": names[i % files], "object": OBJECTS[i % 4], "style": STYLES[i % 3]}
        for i in range(n)
    ]
    captions = [f"a {r['object']} in the style of {r['style']}, {i}" for i, r in enumerate(records)]
    captions[5] = EVIL
    return ImageCaptionDataset(root, records, captions)


def write(
    results, data, prompt="a cat in the style of blob", methods=(), seed=0, targets=("cat", "blob")
):
    """An answer of made-up scores: those of `concept_trak` know the label, others do not."""
    n = len(data)
    settings = resolve("emoji", {"prompt": prompt, "results_dir": str(results), "top_k": 2})
    settings = settings.but(seed=seed, methods=",".join(methods))
    rng, found = np.random.default_rng(seed), []
    for target in targets:
        column = "object" if target == "cat" else "style"
        relevant = np.array([record[column] == target for record in data.records])
        scores = rng.normal(size=(len(DAMPINGS), n)) + 3 * relevant * np.arange(9)[:, None]
        found.append(ConceptResult(target, "", scores, DAMPINGS, relevant))
    noise = torch.zeros(1, 2, 4, 4)
    picture = QueryImage(prompt, noise, noise.clone(), np.full((8, 8, 3), 90, np.uint8))
    answer = AttributionResult(
        picture,
        [Query(picture, target, target, "") for target in targets],
        found,
        data,
        as_dict(settings) | {"store_checksum": str(n)},
        {"git": "abc"},
        True,
        fit=rng.uniform(0.3, 1.3, n),
        others={m: rng.normal(size=(9 if m == "das" else 1, 2, n)) for m in methods},
    )
    return write_answer(answer, settings).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two answers over 600 pictures, one of them with two more methods."""
    root = tmp_path_factory.mktemp("results")
    data = pictures(root / "data", 600)
    write(root / "qual", data)
    write(root / "qual", data, "a dog, a cat and a blob", ("das", "caption_similarity"), 1)
    return root / "qual"


@pytest.fixture(scope="module")
def page_path(results):
    return explore(resolve("emoji", {"results_dir": str(results)}))


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        options = {"executable_path": path, "args": ["--no-sandbox", "--disable-gpu"]}
        try:
            started = playwright.chromium.launch(**options)
        except api.Error:
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        yield started
        started.close()


class Visit:
    """A page, what it complained of, and what it asked the world for."""

    def __init__(self, browser, path, address="", **context):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.errors, self.requests = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        kinds = ("error", "warning")
        self.page.on("console", lambda told: told.type in kinds and self.errors.append(told.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(f"{self.url}{address}")
        self.page.wait_for_selector(".card")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            assert not self.errors
            asked = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
            assert {url.split("#")[0] for url in asked} == {self.url}
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert self.page.evaluate(wide) <= 0, "it can be scrolled to the side"
        self.context.close()

    def cards(self, pane=0):
        """Indices of the pictures in sight, in order."""
        cards = self.page.locator(".pane").nth(pane).locator(".card")
        return [int(i) for i in cards.evaluate_all("all => all.map(c => c.dataset.index)")]

    def says(self, pane=0):
        return self.page.locator(".pane").nth(pane).locator(".says").inner_text()


@pytest.fixture
def visit(browser, page_path):
    with Visit(browser, page_path) as opened:
        yield opened


def scores(results, prompt, target, method=""):
    """[D, N] of an answer on disk."""
    for asked in results.glob("free_query/[!.l]*/question.json"):
        if json.loads(asked.read_text())["prompt"] == prompt:
            return np.load(asked.parent / f"target_{target}/scores{method}.npy")
    raise AssertionError(prompt)


FIRST = "a dog, a cat and a blob"  # the newest, shown first


def test_it_opens_on_the_newest_answer_in_the_order_of_its_scores(visit, results):
    chosen = visit.page.locator("#answer option:checked").inner_text()
    assert chosen.startswith(FIRST)
    order = np.argsort(-scores(results, FIRST, "cat")[5], kind="stable")
    shown = visit.cards()
    assert len(shown) < 100 and shown == order[: len(shown)].tolist()
    assert visit.page.locator("#damping-value").inner_text() == "DAMPING=1 (fixed)"
    assert "600 of 600" in visit.says() and "Recall@10" in visit.says()
    assert visit.page.title() == "Explorer · concept attribution"  # nothing of EVIL ran
    thumb = visit.page.locator(".card .thumb").first
    assert "blob:" in thumb.evaluate("t => getComputedStyle(t).backgroundImage")


def test_a_filter_keeps_the_order_and_the_ranks(visit, results):
    visit.page.fill("#filter", "tree in the style of line")
    order = np.argsort(-scores(results, FIRST, "cat")[5], kind="stable")
    wanted = [i for i in order if OBJECTS[i % 4] == "tree" and STYLES[i % 3] == "line" and i != 5]
    assert visit.cards() == wanted[: len(visit.cards())]
    assert f"{len(wanted)} of 600" in visit.says() and "pass the filter" in visit.says()
    rank = visit.page.locator(".card b").first.inner_text()
    assert int(rank) == order.tolist().index(wanted[0]) + 1 > 1
    visit.page.fill("#filter", "")
    visit.page.select_option('[data-label="object"]', "boat")
    assert {OBJECTS[i % 4] for i in visit.cards()} == {"boat"} and "150 of 600" in visit.says()
    visit.page.fill("#filter", "no such words")
    assert visit.page.locator(".none").inner_text() == "No picture passes the filter."


def test_sorting_and_both_ends(visit, results):
    order = np.argsort(-scores(results, FIRST, "cat")[5], kind="stable").tolist()
    visit.page.select_option("#sort", "low")
    assert visit.cards()[:10] == order[::-1][:10]
    visit.page.select_option("#sort", "high")
    visit.page.get_by_role("button", name="Lowest").click()
    visit.page.wait_for_selector(f'.card[data-index="{order[-1]}"]')
    assert visit.cards()[-1] == order[-1]
    visit.page.get_by_role("button", name="Highest").click()
    assert visit.cards()[0] == order[0]
    visit.page.select_option("#sort", "unfit")
    assert "⚠" in visit.page.locator(".card").first.inner_text()


def test_two_methods_and_two_concepts_are_compared(visit, results):
    visit.page.click("#compare")
    ours, das = scores(results, FIRST, "cat"), scores(results, FIRST, "cat", "-das")
    orders = [np.argsort(-s[5], kind="stable") for s in (ours, das)]
    for pane, order in enumerate(orders):
        shown = visit.cards(pane)
        assert shown == order[: len(shown)].tolist()
    ranks = [np.argsort(order) for order in orders]
    wanted = np.corrcoef(*ranks)[0, 1]
    told = visit.page.locator("#agreement").inner_text()
    assert f"rank correlation {wanted:.2f}".replace("-", "−") in told
    assert f"{len({*orders[0][:10]} & {*orders[1][:10]})} of the ten highest are the same" in told
    visit.page.select_option("#sort", "apart")
    gap = np.abs(ranks[0] - ranks[1])
    assert gap[visit.cards(0)[0]] == gap.max()
    right = visit.page.locator(".pane").nth(1)
    right.locator("select[aria-label=method]").select_option("concept_trak")
    right.locator("select[aria-label=concept]").select_option("1")
    visit.page.select_option("#sort", "high")
    blob = np.argsort(-scores(results, FIRST, "blob")[5], kind="stable").tolist()
    assert visit.cards(1) == blob[: len(visit.cards(1))]


def test_the_damping_slider_is_that_of_the_command_line(visit, results):
    for at in (0, 8):
        visit.page.locator("#damping").fill(str(at))
        told = visit.page.locator("#damping-value").inner_text()
        assert told == f"DAMPING={DAMPINGS[at]:g}"
        order = np.argsort(-scores(results, FIRST, "cat")[at], kind="stable")
        assert visit.cards() == order[: len(visit.cards())].tolist()


def test_an_address_brings_back_what_was_seen(visit, browser, page_path):
    visit.page.click("#compare")
    visit.page.locator("#damping").fill("3")
    visit.page.fill("#filter", "cat")
    visit.page.select_option('[data-label="style"]', "flat")
    address = "#" + urlsplit(visit.page.url).fragment
    with Visit(browser, page_path, address) as other:
        for pane in (0, 1):
            assert other.cards(pane) == visit.cards(pane) and other.says(pane) == visit.says(pane)
        assert other.page.locator("#damping-value").inner_text() == "DAMPING=0.01"
        other.page.evaluate("location.hash = ''")
        other.page.wait_for_function("document.querySelectorAll('.pane').length === 1")


def test_another_answer_is_chosen(visit, results):
    prompt = "a cat in the style of blob"
    visit.page.locator("#answer").select_option(label=prompt)
    order = np.argsort(-scores(results, prompt, "cat")[5], kind="stable")
    assert visit.cards() == order[: len(visit.cards())].tolist()
    methods = visit.page.locator("select[aria-label=method] option").all_inner_texts()
    assert methods == ["concept_trak"]


def test_the_keyboard_alone_is_enough(visit, results):
    page, order = visit.page, np.argsort(-scores(results, FIRST, "cat")[5], kind="stable").tolist()

    def at():
        return int(page.evaluate("document.activeElement.dataset.index ?? -1"))

    for _ in range(30):  # Tab comes to the first card, and to one card only
        page.keyboard.press("Tab")
        if at() >= 0:
            break
    assert at() == order[0]
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert at() == order[place]
    page.keyboard.press("End")
    assert at() == order[-1]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("panes[0].columns")
    assert at() == order[columns] and columns > 1
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible()
    detail = page.locator("#detail").inner_text()
    assert f"{columns + 1}" in detail and "caption_similarity" in detail
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    page.keyboard.press("]")
    assert page.locator("#damping-value").inner_text() == "DAMPING=10"
    page.keyboard.press("/")
    page.keyboard.type("boat")
    page.keyboard.press("Enter")
    assert OBJECTS[at() % 4] == "boat"
    page.keyboard.press("c")
    assert page.locator(".pane").count() == 2


def test_a_card_leads_to_its_picture(visit, page_path):
    visit.page.locator(".card").first.click()
    href = visit.page.locator("#detail-file a").get_attribute("href")
    assert (page_path.parent / unquote(href)).is_file()
    visit.page.get_by_label("close").click()
    report = visit.page.locator("#about a").get_attribute("href")
    assert (page_path.parent / unquote(report)).name == "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_the_dark_are_served(browser, page_path, scheme):
    size = {"width": 400, "height": 800}
    with Visit(browser, page_path, color_scheme=scheme, viewport=size) as visit:
        visit.page.click("#compare")
        visit.page.locator("#figures summary").click()
        lines = "getComputedStyle(document.body)"
        ink, paper = (visit.page.evaluate(f"{lines}.{x}") for x in ("color", "backgroundColor"))
        bright = [sum(map(int, c[4:-1].split(","))) for c in (ink, paper)]
        assert (bright[0] > bright[1]) == (scheme == "dark") and abs(bright[0] - bright[1]) > 400


def test_ten_thousand_pictures_are_there_at_once(browser, tmp_path):
    data = pictures(tmp_path / "data", 10_000, side=64)
    write(tmp_path / "qual", data, methods=("das",))
    path = explore(resolve("emoji", {"results_dir": str(tmp_path / "qual")}))
    paints = []
    for _ in range(3):  # another process may have the cores for a moment
        with Visit(browser, path) as visit:
            entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            paints.append(visit.page.evaluate(entry))
            assert len(visit.cards()) < 100 and "10,000 of 10,000" in visit.says()
            visit.page.locator(".card").first.focus()
            visit.page.keyboard.press("End")
            visit.page.wait_for_selector(".card[data-at='9999']")
        if min(paints) < PAINT:
            break
    assert min(paints) < PAINT, paints


# --- without a browser


def test_sheets_hold_every_picture_at_its_place(tmp_path):
    data = pictures(tmp_path, PER + 3)
    names = [record["file_name"] for record in data.records]
    (tmp_path / names[1]).unlink()
    sheets = SpriteSheets(tmp_path, names, tmp_path / "cache")
    first, second = sheets.encoded()
    assert len([*(tmp_path / "cache").iterdir()]) == 2 and sheets.encoded() == [first, second]
    import base64
    import io

    for text, start in ((first, 0), (second, PER)):
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
        for place in range(min(PER, len(names) - start)):
            y, x = (8 + sheets.side * (place // 16), 8 + sheets.side * (place % 16))
            number = (start + place) % 24
            colour = (255, 255, 255) if number == 1 else (10 * number % 256, 80, 200)
            assert np.abs(sheet[y, x].astype(int) - colour).max() <= 2


def test_an_answer_that_cannot_be_read_is_left_out(results, tmp_path):
    shutil.copytree(results / "free_query", tmp_path / "free_query", symlinks=True)
    folders = [p.parent for p in tmp_path.glob("free_query/[!.l]*/report.html")]
    (folders[0] / "question.json").write_text("{")
    found, wrong = answers_in([tmp_path / "free_query"])
    assert len(found) == 1 and len(wrong) == 1 and str(folders[0]) in wrong[0]


def test_no_answer_yet_is_told_with_the_command(tmp_path):
    (tmp_path / "free_query").mkdir()
    with pytest.raises(UserError, match=r"no answer to explore yet; .*run_qual_free\.sh$"):
        explore(resolve("emoji", {"results_dir": str(tmp_path)}))


def test_the_same_answers_give_the_same_page(results, tmp_path):
    found, _ = answers_in([results / "free_query"])
    for name in ("a", "b"):
        write_explorer(tmp_path / name / "explorer.html", found)
    one, two = ((tmp_path / name / "explorer.html").read_bytes() for name in ("a", "b"))
    assert one == two and b"http:" not in one and b"https:" not in one
    assert dataclasses.is_dataclass(found[0])
