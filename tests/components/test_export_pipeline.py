"""EXPORT: whole or not at all, and never onto what an export did not write."""

import os

import pytest

from concept_trak.components.export import RECORD, export, refuse_place
from concept_trak.errors import UserError


class Pipe:
    """Of a pipeline, what is exported; dies after so many files."""

    def __init__(self, content, dies=9):
        self.content, self.dies = content, dies

    def save_pretrained(self, folder):
        for i in range(3):
            if i == self.dies:
                raise KeyboardInterrupt
            (folder / f"part{i}").mkdir()
            (folder / f"part{i}/weights").write_text(f"{self.content} {i}")


def kept(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model's folder, beside which the program runs."""
    here, folder = tmp_path / "here", tmp_path / "models/sd"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/weights").write_text("the only copy")
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def places(model):
    """{what it is: EXPORT} of folders that are not ours."""
    root = model.parent.parent
    for name in ("file", "used/results/answers", "used/data"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "file").write_text("text")
    (root / "pictures").mkdir()
    (root / "pictures/a.png").write_text("a picture")
    (root / "hidden").mkdir()
    (root / "hidden/.git").write_text("")
    os.symlink(model, root / "link")
    os.symlink(model.parent, root / "link_above")
    os.symlink(root / "pictures", root / "link_to_pictures")
    (root / "claims").mkdir()
    (root / "claims/notes").write_text("mine")
    (root / "claims" / RECORD).write_text('{"sha256": {}}')
    return {
        "the model": model,
        "by another name": model / "../sd",
        "above it": model.parent,
        "inside it": model / "edited",
        "a part of it": model / "unet",
        "a link to it": root / "link",
        "a link above it": root / "link_above",
        "through a link": root / "link_above/sd",
        "pictures": root / "pictures",
        "a link to pictures": root / "link_to_pictures",
        "what is hidden": root / "hidden",
        "a file": root / "file",
        "a record that is no export's": root / "claims",
        "the working folder": root / "here",
        "above the working folder": root,
        "the results": root / "used/results",
        "above the results": root / "used",
    }


def test_only_a_new_folder_or_an_export_is_taken(model):
    root, before = model.parent.parent, None
    for what, place in places(model).items():
        before = before or kept(root)
        with pytest.raises(UserError, match=r"EXPORT=.*; set EXPORT to a new folder$"):
            refuse_place(place, str(model), [root / "used/results", "."])
            pytest.fail(what)
    assert kept(root) == before
    (root / "empty").mkdir()
    for free in (root / "empty", root / "new", root / "new/deeper", root / "used/results/x"):
        refuse_place(free, str(model), [root / "used/results", "."])


def test_an_export_replaces_one_that_nobody_changed(tmp_path):
    folder = tmp_path / "edited"
    export(Pipe("first"), folder, {"edits": ["a"]})
    first = kept(folder)
    export(Pipe("second"), folder, {"edits": ["b"]})
    assert kept(folder).keys() == first.keys() and kept(folder) != first
    assert [p.name for p in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "notes.txt").write_text("mine"),
        lambda f: (f / "part0/weights").write_text("trained on"),
        lambda f: (f / "part1/weights").unlink(),
        lambda f: (f / RECORD).unlink(),
        lambda f: (f / RECORD).write_text("{"),
        lambda f: os.symlink("/etc/hosts", f / "link"),
    ],
)
def test_an_export_that_was_changed_since_is_left_alone(change, tmp_path):
    folder = tmp_path / "edited"
    export(Pipe("first"), folder, {})
    change(folder)
    before = kept(folder)
    with pytest.raises(UserError):
        refuse_place(folder, "model", [])
    with pytest.raises(UserError):
        export(Pipe("second"), folder, {})
    assert kept(folder) == before and [p.name for p in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize("dies", range(3))
def test_an_export_that_ends_early_leaves_what_was_there(dies, tmp_path):
    folder = tmp_path / "edited"
    with pytest.raises(KeyboardInterrupt):
        export(Pipe("first", dies), folder, {})
    assert not list(tmp_path.iterdir())
    export(Pipe("first"), folder, {})
    before = kept(folder)
    with pytest.raises(KeyboardInterrupt):
        export(Pipe("second", dies), folder, {})
    assert kept(folder) == before and len(list(tmp_path.iterdir())) == 1
