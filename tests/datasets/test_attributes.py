"""Pictures with exact labels: seeded, complete, without the combinations that are held out."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from celeba_standin import stand_in
from PIL import Image

from concept_trak.errors import UserError
from concept_trak.models.vocabulary import Vocabulary
from experiments.attributes import celeba, faces
from experiments.attributes import shapes as synthetic
from experiments.attributes.schemes import (
    AttributeScheme,
    labels_of,
    load_labelled,
    parse_held_out,
    read_scheme,
    write_labelled,
)

SMALL = synthetic.SyntheticSettings(count=9, held_out_count=8)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "data"
    synthetic.build(root, SMALL)
    return root


def test_no_train_picture_shows_a_held_out_combination_and_all_others_are_balanced(shapes):
    data, scheme = load_labelled(shapes)
    train = Counter(data.split("train").captions)
    assert train == {"triangle, blue": 3, "circle, red": 3, "circle, blue": 3}
    assert set(Counter(data.split("held_out").captions).values()) == {2}


def test_a_picture_shows_its_labels(shapes):
    """Its colour in its middle, its shape by its share of its bounding box."""
    data, scheme = load_labelled(shapes)
    for i, labels in enumerate(labels_of(scheme, data)):
        pixels = np.asarray(data.image(i)).astype(int)
        inked = (pixels.sum(2) < 700).nonzero()
        box = [slice(a.min(), a.max() + 1) for a in inked]
        colour = np.median(pixels[inked], axis=0)
        assert np.abs(colour - COLOURS[labels["color"]]).max() < 60
        top = pixels[box[0].start : box[0].start + 3, box[1]]
        filled = (top.sum(2) < 700).mean()
        assert (filled < 0.45) == (labels["shape"] == "triangle")


def test_the_same_settings_make_the_same_bytes_and_another_seed_others(shapes, tmp_path):
    for name, settings in (("again", SMALL), ("other", replace(SMALL, seed=1))):
        synthetic.build(tmp_path / name, settings)
    hashes = [
        load_labelled(r)[0].content_hash() for r in (shapes, tmp_path / "again", tmp_path / "other")
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("shape", synthetic.SHAPES)
def test_every_shape_is_drawn_whole_and_differs_from_the_others(shape):
    def ink(name):
        rng = np.random.default_rng(0)
        drawn = synthetic.draw({"shape": name, "color": "red"}, 32, 0.3, rng)
        return np.asarray(drawn).astype(int)

    own = ink(shape)
    border = np.concatenate([own[0], own[-1], own[:, 0], own[:, -1]])
    assert (own != 255).any() and (border == 255).all()
    assert all(np.abs(own - ink(s)).sum() > 3000 for s in synthetic.SHAPES if s != shape)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"shapes": ("triangle", "star")}, "star"),
        ({"colors": ("red", "mauve")}, "mauve"),
        ({"held_out": "triangle green"}, "green"),
        ({"held_out": "triangle"}, "no combination"),
        ({"held_out": "triangle red|triangle blue"}, "no picture of triangle"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        synthetic.build(tmp_path / "data", replace(SMALL, **changes))
    assert not (tmp_path / "data").exists()


def test_held_out_combinations_are_read_in_any_order_of_words():
    vocabulary = Vocabulary({"shape": ("triangle", "circle"), "color": ("red", "blue")})
    wanted = ({"shape": "triangle", "color": "red"}, {"shape": "circle", "color": "blue"})
    assert parse_held_out(vocabulary, "red triangle|circle, blue") == wanted


@pytest.mark.parametrize("spoil", ["missing", "not JSON", "a class without pictures", "a label"])
def test_a_folder_whose_labels_are_not_whole_is_refused(tmp_path, spoil):
    vocabulary = Vocabulary({"a": ("x", "y"), "b": ("u", "v")})
    labels = [{"a": "x", "b": "u"}, {"a": "y", "b": "v"}]
    if spoil == "a class without pictures":
        labels = labels[:1]
    pairs = [(told, Image.new("RGB", (4, 4))) for told in labels]
    write_labelled(tmp_path / "d", AttributeScheme(vocabulary), {"train": (pairs, len(pairs))}, {})
    if spoil == "missing":
        (tmp_path / "d/attributes.json").unlink()
    if spoil == "not JSON":
        (tmp_path / "d/attributes.json").write_text("{")
    if spoil == "a label":
        rows = (tmp_path / "d/metadata.jsonl").read_text().replace('"a": "x"', '"a": "z"')
        (tmp_path / "d/metadata.jsonl").write_text(rows)
    named = {"a class without pictures": "no train picture of a y", "a label": "'z'"}
    with pytest.raises(UserError, match=named.get(spoil, "attributes.json")):
        load_labelled(tmp_path / "d")


# ---- faces


def needs_faces():
    for name in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(name, reason="needs the extra faces")


def test_a_face_shows_what_its_labels_say_and_nothing_else_changes():
    needs_faces()
    base = {"hair": "short", "top": "red_top", "glasses": "no_glasses", "hat": "no_hat"}
    base |= {"beard": "no_beard"}

    def drawn(**changes):
        return np.asarray(faces.draw(base | changes, 16, np.random.default_rng(3))).astype(int)

    plain = drawn()
    changed = {
        name: (np.abs(plain - drawn(**{name: word})).sum(2) > 0).nonzero()[0]
        for name, word in (("hat", "hat"), ("glasses", "glasses"), ("top", "blue_top"))
    }
    assert changed["hat"].max() < 8 <= changed["top"].min()  # rows: above and below the face
    assert changed["glasses"].size and 3 <= changed["glasses"].min() <= changed["glasses"].max() < 9
    assert np.array_equal(plain, drawn())


def test_art_of_another_licence_is_refused(monkeypatch):
    needs_faces()
    faces.definition.cache_clear()
    monkeypatch.setattr(faces, "LICENSE", "CC BY 4.0")
    with pytest.raises(UserError, match="CC0 1.0"):
        faces.definition()


def test_an_attribute_that_no_face_has_is_refused():
    with pytest.raises(UserError, match="moustache.*beard"):
        faces.FaceSettings(("moustache",)).scheme()


# ---- CelebAMask-HQ


def of(root, **changes):
    base = celeba.CelebaSettings(str(root), ("Smiling", "Eyeglasses"), "Smiling Eyeglasses", 16)
    return replace(base, **changes)


def test_celeba_photos_get_their_labels_and_held_out_ones_are_never_trained_on(tmp_path):
    celeba.make(tmp_path / "data", of(stand_in(tmp_path / "source")))
    data, scheme = load_labelled(tmp_path / "data")
    assert read_scheme(tmp_path / "data").held_out == (
        {"Smiling": "Smiling", "Eyeglasses": "Eyeglasses"},
    )
    assert len(data) == 60
    assert not any(map(scheme.is_held_out, labels_of(scheme, data.split("train"))))
    assert any(map(scheme.is_held_out, labels_of(scheme, data.split("held_out"))))
    for i, labels in enumerate(labels_of(scheme, data)):
        pixels = np.asarray(data.image(i))
        bright = [pixels[:6].mean() > 128, pixels[10:].mean() > 128]
        assert bright == [labels["Smiling"] == "Smiling", labels["Eyeglasses"] == "Eyeglasses"]


@pytest.mark.parametrize(
    "spoil, named",
    [
        ("list", "attribute file .* is missing"),
        ("row", "line 5"),
        ("count", "promises 61"),
        ("photo", "7.jpg"),
    ],
)
def test_a_celeba_folder_that_is_not_whole_is_refused_and_nothing_is_left(tmp_path, spoil, named):
    source = stand_in(tmp_path / "source")
    path = source / celeba.LIST
    if spoil == "list":
        path.unlink()
    if spoil == "row":
        lines = path.read_text().splitlines()
        lines[4] = lines[4].replace("1", "2", 1)[:-3]
        path.write_text("\n".join(lines))
    if spoil == "count":
        path.write_text(path.read_text().replace("60", "61", 1))
    if spoil == "photo":
        (source / celeba.IMAGES / "7.jpg").unlink()
    with pytest.raises(UserError, match=named):
        celeba.make(tmp_path / "data", of(source))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"source": ""}, "SOURCE is empty"),
        ({"attributes": ("Smiling", "Eyeglases")}, "Eyeglasses"),
        ({"held_out": "no_Smiling no_Smiling"}, "two of"),
        (
            {"held_out": "Smiling Eyeglasses|no_Smiling no_Eyeglasses|Smiling no_Eyeglasses"},
            "shows Smiling",
        ),
    ],
)
def test_a_celeba_question_that_has_no_answer_is_refused(tmp_path, changes, named):
    source = stand_in(tmp_path / "source")
    with pytest.raises(UserError, match=named):
        celeba.make(tmp_path / "data", of(source, **changes))


def test_a_combination_without_a_photo_is_refused(tmp_path):
    source = stand_in(tmp_path / "source")
    lines = (source / celeba.LIST).read_text().splitlines()
    lines[2:5] = [line.replace("1", "-1", 3).replace("--1", "-1") for line in lines[2:5]]
    text = "\n".join([lines[0], lines[1], *(f"{i}.jpg -1 -1 1 1" for i in range(3)), *lines[5:]])
    (source / celeba.LIST).write_text(text)
    with pytest.raises(UserError, match="no picture shows Smiling and Eyeglasses"):
        celeba.make(tmp_path / "data", of(source))


def test_a_killed_making_leaves_no_folder(tmp_path, monkeypatch):
    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        synthetic.build(tmp_path / "data", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_scheme_is_written_as_it_is_read(shapes):
    found = json.loads((shapes / "attributes.json").read_text())
    assert found["attributes"] == [["shape", ["triangle", "circle"]], ["color", ["red", "blue"]]]
    assert read_scheme(shapes).as_json() == SMALL.scheme().as_json()
