"""A folder of a user's own: every row is what the user gave, or a line says why not."""

import csv
import json
import os
import shutil
import sys
import unicodedata
import zipfile

import pytest
from PIL import Image

from concept_trak.datasets import ImageCaptionDataset, load_folder
from concept_trak.datasets import labels as emoji
from concept_trak.datasets.caption_overlap import caption_overlap
from concept_trak.datasets.list_concepts import frequent_words
from concept_trak.datasets.metadata import OTHERS, PARQUET
from concept_trak.errors import UserError
from experiments.attributes import schemes


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Four pictures without captions."""
    root = tmp_path / "pics"
    for i in range(4):
        picture(root / f"{i}.png", 10 * i)
    return root


def rows_of(root, rows):
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rows(*captions, **more):
    return [{"file_name": f"{i}.png", "text": text, **more} for i, text in enumerate(captions)]


def csv_of(root, text, encoding="utf-8"):
    (root / "metadata.csv").write_bytes(text.encode(encoding))
    return root


def refusal(root):
    with pytest.raises(UserError) as error:
        load_folder(root)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- CSV

BROKEN = {
    "a bare comma": ("file_name,text\n0.png,a cat\n1.png,a dog, asleep\n", "line 3 has 3 fields"),
    "a field too few": ("file_name,text,split\n0.png,a cat,train\n1.png,a\n", "line 3 has 2 fie"),
    "a last comma": ("file_name,text\n0.png,a cat\n1.png,a dog,\n", "line 3 has 3 fields"),
    "a comma into a column without a name": (
        "file_name,text,\n0.png,a cat,\n1.png,a dog, asleep\n",
        "line 3 has a value in a column without a name",
    ),
    "a quote left open": (
        'file_name,text\n0.png,a cat\n1.png,"a dog\n2.png,a cow\n',
        "line 3 .*open",
    ),
    "two quotes left open": ('file_name,text\n0.png,"a cat\n1.png,"a dog"\n', "line 2 .*open"),
    "rows in quotes": (
        'file_name,text\n0.png,"a cat\n1.png,a dog\n2.png,a cow"\n3.png,a hen\n',
        "line 2: a quote is left open",
    ),
    "rows in quotes, semicolons": (
        'file_name;text\n0.png;"a cat\n1.png;a dog"\n3.png;a hen\n',
        "line 2: a quote is left open",
    ),
    "text after a quote": ('file_name,text\n0.png,"a 5" screen\n', "line 2 is not CSV"),
    "a column twice": ("file_name,text,text\n0.png,a cat,a dog\n", "column text is there twice"),
    "two columns of one name": (
        "File_Name,text,FILE_NAME\n0.png,a,b\n",
        "file_name is there twice",
    ),
    "a zero byte": ("file_name,text\n0.png,a\0 cat\n", "zero byte in line 2"),
    "Latin-1": ("file_name,text\n0.png,a caf\udce9\n", "not UTF-8 text .*line 2"),
    "a picture twice": ("file_name,text\n0.png,a\n1.png,b\n0.png,c\n", "row 3: .* 0.png .*row 1"),
    "a picture twice, otherwise": ("file_name,text\n0.png,a\n./0.png,b\n", "row 2: .*row 1"),
    "no file_name": ("image,text\n0.png,a cat\n", r"no file_name .its columns: image, text"),
    "no caption": ("file_name,prompt\n0.png,a cat\n", r"no caption .*columns: file_name, prompt"),
    "an empty caption": (
        "file_name,text\n0.png,a cat\n1.png, \n",
        "row 2: empty caption for 1.png",
    ),
    "a control character": ("file_name,text\n0.png,a \x1b[2J cat\n", "row 1: text holds '.x1b'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_csv_line_that_is_no_row_is_refused_with_its_number(folder, name):
    text, told = BROKEN[name]
    (folder / "metadata.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=told):
        load_folder(folder)


READ = {
    "quotes": ('file_name,text\n0.png,"a cat, asleep"\n1.png,"a ""dog"""\n', "utf-8"),
    "semicolons": ('file_name;text\n0.png;a cat, asleep\n1.png;"a ""dog"""\n', "utf-8"),
    "tabs of a spreadsheet": (
        'file_name\ttext\n0.png\ta cat, asleep\n1.png\t"a ""dog"""\n',
        "utf-16",
    ),
    "a byte order mark": (
        'file_name,text\n0.png,"a cat, asleep"\n1.png,"a ""dog"""\n',
        "utf-8-sig",
    ),
    "capitals": ('File_Name,Text\n0.png,"a cat, asleep"\n1.png,"a ""dog"""\n', "utf-8"),
    "blanks": ('file_name, text\n0.png, "a cat, asleep"\n1.png, "a ""dog"""\n', "utf-8"),
    "CR LF, blank lines": (
        'file_name,text\r\n0.png,"a cat, asleep"\r\n\r\n1.png,a "dog"\r\n',
        "utf-8",
    ),
    "CR": ('file_name,text\r0.png,"a cat, asleep"\r1.png,a "dog"\r', "utf-8"),
    "pandas' numbers": (',file_name,text\n0,0.png,"a cat, asleep"\n1,1.png,a "dog"\n', "utf-8"),
    "an empty last column": ('file_name,text,\n0.png,"a cat, asleep",\n1.png,a "dog",\n', "utf-8"),
    "caption": ('file_name,text,caption\n0.png,,"a cat, asleep"\n1.png,,a "dog"\n', "utf-8"),
}


@pytest.mark.parametrize("name", READ)
def test_tables_that_can_be_read_without_doubt_are_read(folder, name):
    assert load_folder(csv_of(folder, *READ[name])).captions == ["a cat, asleep", 'a "dog"']


def test_a_text_of_several_lines_is_one_text(folder):
    csv_of(folder, 'file_name,text\n0.png,"a cat,\nasleep"\n1.png,a dog\n')
    assert load_folder(folder).captions == ["a cat,\nasleep", "a dog"]


# ---- JSON lines


@pytest.mark.parametrize("gap", ["NaN", "Infinity", "-Infinity", "1e999", "null"])
def test_a_gap_in_a_column_that_nobody_asks_for_is_none(folder, gap):
    line = f'{{"file_name": "0.png", "text": {gap}, "caption": "a cat", "score": [{gap}]}}\n'
    (folder / "metadata.jsonl").write_text(line)
    assert load_folder(folder).captions == ["a cat"]


@pytest.mark.parametrize("text", ["", "  ", None, []])
def test_an_empty_text_beside_a_filled_caption_is_not_the_caption(folder, text):
    assert load_folder(rows_of(folder, rows(text, caption="a cat"))).captions == ["a cat"]


@pytest.mark.parametrize(
    "row, told",
    [
        ({}, "no caption for 0.png .its columns: file_name"),
        ({"prompt": "a cat"}, "no caption for 0.png .its columns: file_name, prompt"),
        ({"text": None}, "no caption for 0.png"),
        ({"text": ""}, "empty caption for 0.png"),
        ({"text": "\n", "caption": " "}, "empty caption for 0.png"),
        ({"text": 3}, "text is 3, not text"),
        ({"caption": {"en": "a cat"}}, "caption is .*en.*, not text"),
        ({"text": ["a", "b"]}, "text is a list of 2, .*python -c"),
        ({"text": "a cat", "split": 3}, "split is 3, not text"),
    ],
)
def test_captions_that_are_absent_empty_or_of_another_type_are_told_apart(folder, row, told):
    rows_of(folder, [{"file_name": "0.png"} | row])
    with pytest.raises(UserError, match=f"metadata.jsonl, row 1: {told}"):
        load_folder(folder)


def test_the_line_for_lists_of_captions_keeps_the_first_of_each(folder, monkeypatch):
    told = refusal(rows_of(folder, rows(["a cat", "a pet"], "a dög")))
    move, _, code = told.partition("to keep the first of each: ")[2].partition(" && ")
    shutil.move(*move.split()[1:])
    code, _, given = code.removeprefix('python -c "').rpartition('" ')
    monkeypatch.setattr(sys, "argv", ["-c", *given.split()])
    exec(code, {})
    assert load_folder(folder).captions == ["a cat", "a dög"]


NO_TEXT = ["\ud83e", "\udca9", "\ud83e \udd86", "\0", "\x1b[2J", "\x07", "\x0b"]


@pytest.mark.parametrize("bad", NO_TEXT, ids=ascii)
def test_what_is_no_character_is_refused_with_its_row(folder, bad):
    for row in ({"text": f"a cat {bad}"}, {"caption": bad + "a cat"}, {"text": "x", "split": bad}):
        rows_of(folder, [*rows("a dog"), {"file_name": "1.png"} | row])
        assert "metadata.jsonl, row 2: " in (told := refusal(folder))
        assert "is no character of a text" in told and told.isprintable()
    rows_of(folder, [*rows("a dog"), {"file_name": f"{bad}.png", "text": "a cat"}])
    assert "metadata.jsonl, row 2: " in refusal(folder)


def test_whole_pairs_and_other_scripts_are_text(folder):
    told = ["a \U0001f986 duck\tand\nmore", "一只猫", "e\u0301 \u200d \ufeff \u202e"]
    assert load_folder(rows_of(folder, rows(*told))).captions == told


# ---- splits


def test_only_what_is_marked_held_out_is_held_out(folder):
    given = ["train", "restval", "", "held_out"]
    rows_of(folder, [r | {"split": s} for r, s in zip(rows(*"abcd"), given, strict=True)])
    data = load_folder(folder)
    assert data.split("train").captions == ["a", "b", "c"]
    assert data.split("held_out").captions == ["d"] and data.split("restval").captions == ["b"]
    assert data.told_splits() == "by split: held_out 1 (kept out), restval 1, train 2"
    csv_of(
        folder, "file_name,text,split\n0.png,a,val\n1.png,b,\n2.png,c, Held-Out \n3.png,d,test\n"
    )
    (folder / "metadata.jsonl").unlink()
    assert load_folder(folder).split("train").captions == ["a", "b", "d"]
    assert load_folder(rows_of(folder, rows("a", "b"))).told_splits() == ""


@pytest.mark.parametrize("word", ["held_out", "HELD_OUT", "held out", "heldout", " held-out"])
def test_a_folder_of_held_out_pictures_alone_is_told(folder, word):
    data = load_folder(rows_of(folder, rows("a", "b", split=word)))
    with pytest.raises(UserError, match="no picture to train on: all are held out"):
        data.split("train")


def test_splits_of_labelled_pictures_are_parts_of_their_own(folder):
    rows_of(folder, rows("a", split="train") + rows("a", "b", split="classifier")[1:])
    assert len(load_folder(folder).split("train")) == 2
    (folder / schemes.ATTRIBUTES).write_text("{}")
    for data in (load_folder(folder), load_folder(folder).subset([1, 0])):
        assert data.split("train").captions == ["a"]


# ---- labels


@pytest.mark.parametrize(
    "own",
    [
        {"style": "Cubism"},
        {"object": "cat"},
        {"style": 3, "object": [0.1, 0.2, 0.3, 0.4]},
        {"object": "cat", "style": "Cubism"},
        {"object": "cat", "style": "Cubism", "style_phrase": "cubism"},
    ],
)
def test_columns_of_other_peoples_data_are_no_labels(folder, own):
    data = load_folder(rows_of(folder, rows("a cat", "a dog") + [rows("", "", "c")[2] | own]))
    data = data.subset([2])
    assert not emoji.has_labels(data) and emoji.relevance_or_none(data, "cat") is None
    emoji.check_known(data, "a zebra in the style of x", ["zebra"])


def test_the_benchmarks_labels_are_in_every_row_or_the_row_is_told(folder):
    labels = {"object": "cat", "object_phrase": "a cat", "style": "blob", "style_phrase": "blob"}
    data = load_folder(rows_of(folder, rows("a cat in the style of blob", **labels)))
    assert emoji.has_labels(data) and emoji.relevance_or_none(data, "Cat").all()
    for wrong, told in (({"style": 3}, "style is 3"), ({"object": None}, "has no object: ")):
        rows_of(folder, [*rows("x", **labels), rows("x", "y", **labels)[1] | wrong])
        assert f"row 2{' ' if 'has' in told else ': '}{told}" in refusal(folder)


# ---- names


def test_links_are_followed_as_they_are_when_the_folder_is_read(tmp_path):
    """A hub's cache, a linked folder, a folder that is a link itself."""
    root, blobs = tmp_path / "snapshots/x", tmp_path / "blobs"
    root.mkdir(parents=True)
    for i, name in enumerate("abc"):
        picture(blobs / f"{name}.png", 50 * i).rename(blobs / name)
    (root / "0.png").symlink_to("../../blobs/a")
    (root / "1.png").symlink_to(blobs / "b")
    (root / "same.png").symlink_to("0.png")
    (root / "sub").symlink_to(blobs)
    names = ["0.png", "1.png", "same.png", "sub/c"]
    rows_of(root, [{"file_name": name, "text": name} for name in names])
    (tmp_path / "here").symlink_to(root)
    for place in (root, tmp_path / "here"):
        data = load_folder(place)
        assert data.images(range(4))[:, 0, 0, 0].tolist() == [0, 50, 0, 100]
        assert len(set(data.digests())) == 4 and data.media_type(3) == "image/png"


def test_captions_are_of_pictures_in_linked_folders_too(tmp_path):
    picture(tmp_path / "far/b.png")
    root = picture(tmp_path / "pics/c.png").parent
    (root / "a").symlink_to(tmp_path / "far")
    (root / "again").symlink_to(root)  # and what leads back is met once
    (tmp_path / "far/back").symlink_to(tmp_path / "far")
    (root / "captions.txt").write_text("one\ntwo\n")
    assert load_folder(root).column("file_name") == ["a/b.png", "c.png"]


def secret(tmp_path):
    picture(tmp_path / "secret/0.png", 99)
    return tmp_path / "secret"


EXCHANGED = {
    "a link to another file": lambda root, far: swap(root / "0.png", far / "0.png"),
    "a link to a file of the system": lambda root, far: swap(root / "0.png", "/etc/passwd"),
    "a link to a file beside it": lambda root, far: swap(root / "0.png", "1.png"),
    "a linked folder on the way": lambda root, far: swap(root, far),
    "a chain of links": lambda root, far: (swap(root / "0.png", "x"), swap(root / "x", far)),
    "a link to itself": lambda root, far: swap(root / "0.png", "0.png"),
    "a pipe": lambda root, far: ((root / "0.png").unlink(), os.mkfifo(root / "0.png")),
    "a folder": lambda root, far: ((root / "0.png").unlink(), (root / "0.png").mkdir()),
    "nothing": lambda root, far: (root / "0.png").unlink(),
    "an empty file": lambda root, far: (root / "0.png").write_bytes(b""),
}


def swap(path, target):
    if path.exists():
        path.rename(path.with_name("aside"))
    path.symlink_to(target)


@pytest.mark.parametrize("which", EXCHANGED)
def test_what_is_exchanged_after_it_was_listed_is_refused_at_use(folder, tmp_path, which):
    data = load_folder(rows_of(folder, rows(*"abcd")))
    part, far = data.split("train").subset([0, 1]), secret(tmp_path)
    EXCHANGED[which](folder, far)
    for read in (part.image, part.media_type, part.open_file, lambda _: part.digests(), data.image):
        with pytest.raises(UserError, match="0.png .*; put another picture there"):
            read(0)


def test_a_link_that_leads_elsewhere_later_does_not_change_what_was_listed(tmp_path):
    root, far = tmp_path / "pics", secret(tmp_path)
    root.mkdir()
    (root / "0.png").symlink_to(picture(tmp_path / "blobs/0.png", 7))
    data = load_folder(rows_of(root, rows("a")))
    (root / "0.png").unlink()
    (root / "0.png").symlink_to(far / "0.png")
    assert data.image(0).getpixel((0, 0)) == (7, 7, 7)  # never the secret one
    swap(tmp_path / "blobs", far)
    with pytest.raises(UserError, match="0.png has become a link since it was listed"):
        data.image(0)


def test_a_picture_that_was_edited_is_read_anew(folder):
    data = load_folder(rows_of(folder, rows(*"abcd")))
    picture(folder / "new.png", 200).rename(folder / "0.png")
    assert data.image(0).getpixel((0, 0)) == (200, 200, 200)


def test_a_link_that_leads_nowhere_is_told(folder):
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to("../blobs/lost")
    assert "row 1: the file 0.png is a link to ../blobs/lost" in refusal(rows_of(folder, rows("a")))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_found_however_their_accents_are_written(tmp_path, form):
    other = "NFD" if form == "NFC" else "NFC"
    name = "Ünï/café ầ 한.png"
    picture(tmp_path / unicodedata.normalize(form, name), 7)
    text = [{"file_name": unicodedata.normalize(other, name), "text": "a"}]
    data = load_folder(rows_of(tmp_path, text))
    assert data.image(0).getpixel((0, 0)) == (7, 7, 7) and data.path(0).is_file()
    rows_of(
        tmp_path,
        [{"file_name": unicodedata.normalize(f, name), "text": "a"} for f in (form, other)],
    )
    assert "is that of row 1, too" in refusal(tmp_path)


def test_captions_are_in_one_order_however_accents_are_written(tmp_path):
    for form in ("NFC", "NFD"):
        root = tmp_path / form
        for i, name in enumerate(["é.png", "f.png", "z.png"]):
            picture(root / unicodedata.normalize(form, name), i)
        (root / "captions.txt").write_text("one\ntwo\nthree\n")
    found = [load_folder(tmp_path / form) for form in ("NFC", "NFD")]
    assert found[0].content_hash() == found[1].content_hash()


def test_words_are_the_same_however_accents_are_written():
    nfc, nfd = (unicodedata.normalize(f, "a café") for f in ("NFC", "NFD"))
    data = ImageCaptionDataset("", [{"file_name": "0"}, {"file_name": "1"}], [nfc, nfd])
    assert frequent_words(data) == {"café": 2}
    assert caption_overlap(nfd, [nfc]).tolist() == [1.0]
    labels = {"object": nfc, "object_phrase": nfc, "style": "x", "style_phrase": "x"}
    known = ImageCaptionDataset("", [{"file_name": "0"} | labels], ["x"])
    assert emoji.relevant(known, nfd.upper()).all()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_a_name_that_is_no_text_is_told(folder):
    os.rename(folder / "0.png", os.fsencode(folder) + b"/caf\xe9.png")
    (folder / "captions.txt").write_text("a\nb\nc\nd\n")
    assert "captions.txt, row 4: file_name holds '\\udce9'" in refusal(folder)


HIDDEN = [".0.png", "._1.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png"]
HIDDEN += ["sub/.thumbnails/x.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "Thumbs.db", ".DS_Store"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_are_not_data(folder, name):
    for kind in ("captions.txt", "sidecar"):
        if kind == "captions.txt":
            (folder / kind).write_text("a\nb\nc\nd\n")
        else:
            (folder / "captions.txt").unlink()
            [(folder / f"{i}.txt").write_text("abcd"[i]) for i in range(4)]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
        assert load_folder(folder).captions == list("abcd")


def test_pictures_of_every_kind_that_is_read_count(folder):
    Image.new("RGB", (8, 8)).save(folder / "1b.tif")
    (folder / "captions.txt").write_text("a\nb\nc\nd\n")  # one would move down unseen
    assert "4 captions but the folder has 5 images" in refusal(folder)


# ---- other layouts


def test_a_text_beside_each_picture_is_its_caption(folder):
    picture(folder / "10_cat/x.JPG").with_suffix(".caption").write_text("\ufeffa cat\n", "utf-8")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f" text {i}\n\n")
    (folder / "README.txt").write_text("two\nlines")
    data = load_folder(folder)
    assert data.captions == ["text 0", "text 1", "a cat", "text 2", "text 3"]
    (folder / "2.txt").write_text("one\ntwo\n")
    assert refusal(folder).endswith("2.txt has 2 lines; leave one caption in 2.txt")
    (folder / "2.txt").write_text(" \n")
    assert "2.txt: empty caption for 2.png; write one" in refusal(folder)
    (folder / "2.txt").unlink()
    assert "2.png has no caption beside it" in refusal(folder)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_other_programs_keep_pictures_in_is_named_with_what_converts_it(tmp_path, kind):
    root = tmp_path / "its pictures"
    root.mkdir()
    name = kind if kind.startswith("meta") else f"shard-000{kind}"
    (root / name).write_bytes(b"x")
    for place in (root, root / name):
        told = refusal(place)
        assert f"{root / name} is not read as it is; " in told and f"'{root}" in told
    picture(root / "0.png")
    assert "is not read as it is" in refusal(root)
    rows_of(root, rows("a cat"))
    assert len(load_folder(root)) == 1


def test_an_archive_unpacked_as_told_is_read(folder, tmp_path, monkeypatch):
    """As webdataset has them: 000.jpg, 000.txt."""
    with zipfile.ZipFile(tmp_path / "shard.zip", "w") as archive:
        for i in range(4):
            archive.write(folder / f"{i}.png", f"{i}.png")
            archive.writestr(f"{i}.txt", f"text {i}")
    zipfile.ZipFile(tmp_path / "shard.zip").extractall(tmp_path / "my_pictures")
    assert load_folder(tmp_path / "my_pictures").captions == [f"text {i}" for i in range(4)]


def test_the_line_for_parquet_writes_pictures_and_texts(folder, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    images = [{"bytes": (folder / f"{i}.png").read_bytes(), "path": None} for i in range(2)]
    table = pyarrow.table({"image": images, "text": ["a\ncat", "a dog"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    exec(PARQUET.replace("{{", "{").replace("}}", "}"), {})
    assert load_folder(tmp_path / "my_pictures").captions == ["a cat", "a dog"]


def test_metadata_of_a_folder_below_is_named(folder):
    csv_of(folder, "file_name,text\n0.png,a\n")
    assert f"{folder / 'metadata.csv'} is there; give the folder" in refusal(folder.parent)


def test_a_table_of_any_text_comes_back_as_it_was(folder):
    texts = ["a, b", 'say "x"', "two\nlines", "; , \t", "'", "a,", ' "', "ü 猫"]
    for i in range(len(texts)):
        picture(folder / f"{i}.png")
    for parted in ",;\t":
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            lines = [("file_name", "text"), *((f"{i}.png", t) for i, t in enumerate(texts))]
            csv.writer(file, delimiter=parted).writerows(lines)
        assert load_folder(folder).captions == texts
