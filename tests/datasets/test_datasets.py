"""The embedded emoji data, its loaders and its builder."""

import csv
import importlib.util
import json
import struct
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concept_trak.datasets import ImageCaptionDataset, labels, load_folder
from concept_trak.errors import UserError
from experiments.emoji.artwork import build as build_emoji
from experiments.emoji.artwork import sources as emoji_sources

EMOJI = Path(__file__).resolve().parents[2] / "data" / "emoji"


@pytest.fixture(scope="module")
def dataset():
    return load_folder(EMOJI)


def write_picture(path, color, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three pictures without captions."""
    for name, color in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0)), ("sub/c.png", (0, 0, 255))):
        write_picture(tmp_path / name, color)
    return tmp_path


def write_jsonl(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# The embedded data


def test_held_out_cells_are_disjoint_from_train(dataset):
    def cells(rows):
        return {(row["object"], row["style"]) for row in rows}

    train, held = dataset.split("train"), dataset.split("held_out").records
    assert cells(train.records).isdisjoint(cells(held))
    assert len(train) == 896 and len(held) == 128 and len(dataset) == 1024
    assert len(cells(dataset.records)) == 1024


def test_every_object_has_seven_train_styles_and_every_style_16_held_out_cells(dataset):
    assert set(Counter(dataset.split("train").column("object")).values()) == {7}
    assert set(Counter(row["style"] for row in dataset.split("held_out").records).values()) == {16}


def test_no_held_out_picture_is_in_the_training_set(dataset):
    train = {picture.tobytes() for picture in dataset.split("train").images(range(896))}
    held = dataset.split("held_out")
    assert not any(picture.tobytes() in train for picture in held.images(range(len(held))))


def test_twins_are_train_cells_of_the_same_family(dataset):
    train = {(row["object"], row["style"]): row for row in dataset.split("train").records}
    for row in dataset.records:
        if row["split"] == "train":
            assert row["twin_in_train"] == []
        for style in row["twin_in_train"]:
            assert train[row["object"], style]["family"] == row["family"]
    assert sum(bool(row["twin_in_train"]) for row in dataset.split("held_out").records) == 64


def test_every_row_has_licence_source_and_credit(dataset):
    credits = (EMOJI / "ATTRIBUTION.md").read_text()
    texts = {
        "MIT": "MIT-Microsoft",
        "Apache-2.0": "Apache-2.0",
        "CC-BY-4.0": "CC",
        "CC-BY-SA-4.0": "CC",
    }
    for row in dataset.records:
        assert (EMOJI / "LICENSES" / f"{texts[row['license']]}.txt").stat().st_size > 0
        assert f"| {row['style']} | {row['source']} | {row['license']} |" in credits


def test_captions_are_made_of_the_phrases(dataset):
    for row, text in zip(dataset.records, dataset.captions, strict=True):
        assert text == row["text"] == labels.caption(row["object_phrase"], row["style_phrase"])


def test_committed_tree_has_the_committed_digest():
    assert build_emoji.tree_digest(EMOJI) == (EMOJI / build_emoji.DIGEST_FILE).read_text().strip()


def test_committed_metadata_is_what_the_tables_say(dataset):
    rows, _, _ = build_emoji.preset_rows(build_emoji.DEFAULT_PRESET)
    assert rows == dataset.records


def test_embedded_data_is_at_most_6_mb():
    files = [
        p
        for p in EMOJI.rglob("*")
        if p.is_file()
        and p.relative_to(EMOJI).parts[0] not in ("pipeline", "judge", "grads", "checkpoints")
    ]
    assert sum(p.stat().st_size for p in files) <= 6_000_000


def test_pictures_are_64_px_rgb_and_not_blank(dataset):
    pictures = dataset.images(range(0, 1024, 9))
    assert pictures.shape[1:] == (64, 64, 3) and pictures.dtype == np.uint8
    assert ((pictures < 250).any(axis=3).mean(axis=(1, 2)) > build_emoji.MIN_INK).all()


# Concepts


def test_concept_words_lead_to_their_pictures(dataset):
    for word in ("cat", "a cat", " A Cat "):
        assert set(np.array(dataset.column("object"))[labels.relevant(dataset, word)]) == {"cat"}
    for word in ("openmoji line", "openmojiline", "in the style of openmoji line"):
        mask = labels.relevant(dataset, word)
        assert mask.sum() == 128 and set(np.array(dataset.column("style"))[mask]) == {
            "openmojiline"
        }
    assert labels.relevant(dataset.split("train"), "cat").sum() == 7


def test_every_concept_word_is_unambiguous(dataset):
    meanings = defaultdict(set)
    for row in dataset.records:
        for column in ("object", "style"):
            for name in (row[column], row[f"{column}_phrase"]):
                meanings[name.casefold()].add((column, row[column]))
    assert all(len(found) == 1 for found in meanings.values())
    assert labels.concepts(dataset)["a cat"] == ("object", "cat")


def test_unknown_concept_names_close_matches(dataset):
    with pytest.raises(UserError, match="openmoji line") as error:
        labels.relevant(dataset, "openmojj line")
    assert "\n" not in str(error.value)
    told = r"it knows 128 of that kind .object., such as .* all: bash .*concepts\.sh"
    with pytest.raises(UserError, match=told):
        labels.relevant(dataset, "zzzzqqqq")


# The loader


def test_all_three_layouts_load_alike(folder):
    names, captions = ["a.png", "b.png", "sub/c.png"], ["red", "green, or so", "blue"]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    from_captions = load_folder(folder)
    with open(folder / "metadata.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([("file_name", "caption"), *zip(names, captions, strict=True)])
    from_csv = load_folder(folder)
    write_jsonl(folder, [{"file_name": n, "text": c} for n, c in zip(names, captions, strict=True)])
    for loaded in (from_captions, from_csv, load_folder(folder)):
        assert loaded.captions == captions and loaded.column("file_name") == names
        assert loaded.images(range(3))[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
        assert loaded.content_hash() == from_captions.content_hash()
        assert len(loaded.split("train")) == 3


def test_content_hash_sees_captions_pixels_and_order(folder):
    (folder / "captions.txt").write_text("x\ny\nz\n")
    first = load_folder(folder)
    hashes = {
        first.content_hash(),
        first.subset([1, 0, 2]).content_hash(),
        first.subset([0, 1]).content_hash(),
    }
    (folder / "captions.txt").write_text("x\ny\nw\n")
    hashes.add(load_folder(folder).content_hash())
    write_picture(folder / "b.png", (0, 254, 0))
    hashes.add(load_folder(folder).content_hash())
    assert len(hashes) == 5


def test_missing_columns_are_none_and_subsets_keep_order(folder):
    write_jsonl(
        folder,
        [{"file_name": "b.png", "text": "x", "object": "cat"}, {"file_name": "a.png", "text": "y"}],
    )
    loaded = load_folder(folder)
    assert loaded.column("object") == ["cat", None]
    assert loaded.subset(np.array([1, 0])).captions == ["y", "x"]


def test_transparency_becomes_white_and_sizes_are_brought_together(tmp_path):
    write_picture(tmp_path / "a.png", (0, 0, 0, 0), (10, 10), "RGBA")
    write_picture(tmp_path / "b.png", 0, (30, 20), "L")
    (tmp_path / "captions.txt").write_text("empty\nblack\n")
    loaded = load_folder(tmp_path)
    pictures = loaded.images([0, 1], size=16)
    assert (
        pictures.shape == (2, 16, 16, 3) and (pictures[0] == 255).all() and (pictures[1] == 0).all()
    )
    with pytest.raises(UserError, match="differ in size"):
        loaded.images([0, 1])


def test_bad_folders_are_told_in_one_line(folder):
    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            load_folder(folder)
        assert "\n" not in str(error.value)

    with pytest.raises(UserError, match="does not exist"):
        load_folder(folder / "nowhere")
    refused("has no captions")
    (folder / "captions.txt").write_text("one\ntwo\n")
    refused("2 captions but the folder has 3 images")
    (folder / "captions.txt").write_text("one\n \nthree\n")
    refused("row 2: empty caption for b.png")
    for rows, match in (
        (
            [{"file_name": "a.png", "text": "x"}, {"file_name": "gone.png"}],
            "row 2: the file gone.png does not exist",
        ),
        ([{"file_name": "a.png"}], "no caption for a.png .its columns: file_name"),
        ([{"text": "x"}], "no file_name"),
        ([], "is empty"),
    ):
        write_jsonl(folder, rows)
        refused(match)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_na')
    refused("line 2 is not JSON")


def test_unreadable_picture_and_unknown_split_are_named(folder):
    good = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(b"not a picture")
    (folder / "b.png").write_bytes(good[:40])  # header and a piece of the first data chunk
    (folder / "captions.txt").write_text("x\ny\nz\n")
    loaded = load_folder(folder)
    for index, name in ((0, "a.png"), (1, "b.png")):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture"):
            loaded.images([index])
    with pytest.raises(UserError, match="no split 'held_out'"):
        loaded.split("held_out")


# The builder


def test_framing_is_deterministic_centred_and_free_of_padding():
    drawing = np.zeros((256, 256, 4), np.uint8)
    drawing[40:140, 100:150] = (200, 10, 10, 255)  # 100 high, 50 wide, off centre
    drawing[200, 200] = (0, 0, 0, build_emoji.ALPHA_THRESHOLD)  # too faint to count
    picture = np.asarray(build_emoji.crop_and_center(Image.fromarray(drawing), 64))
    ys, xs = np.nonzero(picture.min(axis=2) < 250)
    height, width = round(build_emoji.FILL * 64), round(build_emoji.FILL * 32)
    assert (ys.min(), ys.max() + 1) == ((64 - height) // 2, (64 - height) // 2 + height)
    assert (xs.min(), xs.max() + 1) == ((64 - width) // 2, (64 - width) // 2 + width)
    shifted = np.roll(drawing, (30, -60), axis=(0, 1))
    assert (np.asarray(build_emoji.crop_and_center(Image.fromarray(shifted), 64)) == picture).all()


def test_nearly_empty_and_repeated_pictures_are_refused():
    rows = [{"file_name": f"images/s/{i}.png", "style": "s"} for i in range(2)]
    black = Image.new("RGB", (64, 64))
    with pytest.raises(UserError, match="images/s/1.png is nearly empty"):
        build_emoji.check_pictures(
            rows, [black, build_emoji.crop_and_center(Image.new("RGBA", (9, 9)), 64)]
        )
    with pytest.raises(UserError, match="images/s/1.png shows the same picture as images/s/0.png"):
        build_emoji.check_pictures(rows, [black, black])


def test_every_preset_holds_out_an_eighth_without_losing_an_object():
    for preset in ("s5i-n64", "s6-n128", "s7i-n256", "s8-n64", "s8-n256"):
        rows, _, sources = build_emoji.preset_rows(preset)
        style_set, size = preset.split("-n")
        train = Counter(row["object"] for row in rows if row["split"] == "train")
        assert len(rows) == int(size) * len(sources["style_sets"][style_set])
        assert sum(row["split"] == "held_out" for row in rows) == len(rows) // 8
        assert (
            len(train) == int(size)
            and min(train.values()) >= len(sources["style_sets"][style_set]) - 1
        )
    rows, _, _ = build_emoji.preset_rows("s8-n364")  # the judge's: all art there is
    assert len(rows) == 364 * 8 and {row["split"] for row in rows} == {"train"}
    with pytest.raises(UserError, match="s8-n128"):
        build_emoji.preset_rows("s9-n1")


def test_altered_tarball_stops_the_build(tmp_path):
    tarball = tmp_path / "scope-pack-1.0.tgz"
    tarball.write_bytes(b"right")
    pinned = emoji_sources.integrity_of(tarball)
    assert emoji_sources.fetch("@scope/pack", "1.0", pinned, tmp_path) == tarball
    tarball.write_bytes(b"wrong")
    with pytest.raises(UserError, match="is not the pinned @scope/pack@1.0"):
        emoji_sources.fetch("@scope/pack", "1.0", pinned, tmp_path)


def test_written_dataset_has_the_same_digest_twice_and_loads(tmp_path):
    rows, _, sources = build_emoji.preset_rows("s5i-n64")
    rows = rows[:6]
    pictures = [Image.fromarray(np.full((64, 64, 3), 30 * i, np.uint8)) for i in range(6)]
    # The last one goes over an older build.
    digests = [
        build_emoji.write_dataset(tmp_path / name, rows, pictures, sources)
        for name in ("a", "b", "a")
    ]
    assert len(set(digests)) == 1 and not list(tmp_path.rglob("*.part"))
    loaded = load_folder(tmp_path / "a")
    assert (
        loaded.records == rows
        and (loaded.images([3]) == 90).all()
        and (tmp_path / "a/LICENSES/CC.txt").is_file()
    )
    pictures[2] = pictures[3]
    assert build_emoji.write_dataset(tmp_path / "b", rows, pictures, sources) != digests[0]


def test_iconify_icons_are_found_by_name_and_alias():
    icons = {
        "prefix": "p",
        "width": 32,
        "icons": {"x": {"body": "<g/>", "height": 8}},
        "aliases": {"y": {"parent": "x"}},
    }
    assert 'viewBox="0 0 32 8"' in emoji_sources.iconify_svg(icons, "x")
    assert emoji_sources.iconify_svg(icons, "y") == emoji_sources.iconify_svg(icons, "x")
    with pytest.raises(UserError, match="icon 'z' is not in the iconify set 'p'"):
        emoji_sources.iconify_svg(icons, "z")


@pytest.mark.skipif(
    importlib.util.find_spec("resvg_py") is None,
    reason="resvg-py (extra build-data) is not installed",
)
def test_svg_is_drawn_with_alpha_at_full_width():
    circle = emoji_sources.SVG.format(
        box="0 0 10 10", body='<circle cx="5" cy="5" r="5" fill="#00f"/>'
    )
    drawing = emoji_sources.render_svg(circle, "circle")
    assert (
        drawing.size == (256, 256)
        and drawing.getpixel((128, 128)) == (0, 0, 255, 255)
        and drawing.getpixel((0, 0))[3] == 0
    )
    with pytest.raises(UserError, match="resvg cannot draw broken"):
        emoji_sources.render_svg("<svg", "broken")


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "x/../../a.png", "link/../a.png"])
def test_metadata_may_only_name_files_below_its_folder(tmp_path, name):
    root = tmp_path / "data"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "sub/folder")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a cat"}) + "\n")
    with pytest.raises(UserError, match="lies outside"):
        load_folder(root)


def png_of(width, height):
    """A whole PNG of so many black pixels, made without decoding them."""
    row = zlib.compressobj(9)
    body = row.compress(bytes(min((width + 7) // 8 + 1, 10**6))) + row.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", body)]
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*chunks, (b"IEND", b"")]:
        made += struct.pack(">I", len(data)) + kind + data
        made += struct.pack(">I", zlib.crc32(kind + data))
    return made


@pytest.mark.parametrize("size", [(20_000, 20_000), (200_000_000, 1), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_of(*size))
    data = ImageCaptionDataset(tmp_path, [{"file_name": "bomb.png"}], ["a bomb"])
    with pytest.raises(UserError, match="bomb.png") as error:
        data.image(0)
    assert "\n" not in str(error.value)


def test_a_photo_of_ninety_megapixels_is_read_without_a_warning(tmp_path, recwarn):
    Image.new("1", (9_500, 9_500)).save(tmp_path / "photo.png")
    data = ImageCaptionDataset(tmp_path, [{"file_name": "photo.png"}], ["a photo"])
    assert data.image(0, 8).size == (8, 8) and not recwarn.list
