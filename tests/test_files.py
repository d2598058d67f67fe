"""Files and folders that appear whole, however many write them, and names that stay inside."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from concept_trak.atomic_io import atomic, atomic_folder, write_bytes, write_json
from concept_trak.errors import UserError
from concept_trak.validated_io import read_json, read_npy, read_safetensors, read_text, safe_join

MEND = "make it again"


def fill(folder, text, count=20):
    for _ in range(count):
        with atomic_folder(folder) as part:
            (part / "one").write_text(text)
            (part / "two").write_text(text)


def test_writers_of_one_folder_at_once_leave_one_of_theirs_whole(tmp_path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=fill, args=(tmp_path / "made", text)) for text in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    found = {path.read_text() for path in (tmp_path / "made").iterdir()}
    assert len(found) == 1 and found <= set("abcd") and os.listdir(tmp_path) == ["made"]


def test_writers_of_one_file_at_once_leave_one_of_theirs_whole(tmp_path):
    def write(text):
        for _ in range(50):
            write_bytes(tmp_path / "made", text.encode() * 1000)

    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(text,)) for text in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(set((tmp_path / "made").read_text())) == 1 and os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize("writer", [atomic, atomic_folder])
def test_a_killed_writer_leaves_the_old_and_the_next_one_tidies_up(tmp_path, writer):
    def killed():
        with writer(tmp_path / "made") as opened:
            if writer is atomic:
                opened.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "made").exists() and len(os.listdir(tmp_path)) == 1
    with writer(tmp_path / "made"):
        pass
    assert os.listdir(tmp_path) == ["made"]


def test_an_error_while_a_folder_is_filled_leaves_the_old_one(tmp_path):
    fill(tmp_path / "made", "old", 1)
    with pytest.raises(ValueError), atomic_folder(tmp_path / "made") as part:
        (part / "one").write_text("new")
        raise ValueError
    assert (tmp_path / "made/one").read_text() == "old" and os.listdir(tmp_path) == ["made"]


NAMES = ["../x", "/etc/passwd", "a/../..", "", " ", "a\0b", ".", "..", "x/../../y", None, 3]


@pytest.mark.parametrize("name", [*NAMES, "link/x", "a" * 5000, "loop/x"])
def test_a_name_from_outside_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    with pytest.raises(UserError) as error:
        safe_join(root, name, "the listing's file")
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_a_name_from_outside_that_stays_inside_is_taken(tmp_path):
    assert safe_join(tmp_path, "a/../b/c.png", "the file") == tmp_path / "a/../b/c.png"


def spoilt(path, content):
    if content is None:
        return
    if content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(content)


HUGE = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
HUGE += b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9), }".ljust(117) + b"\n"
ANY = [None, "folder", "fifo", b"", b"\0", b"\xff\xfe", b"PK\x03\x04", b"\x80\x04K\x01.", HUGE]
JSONS = [b"{", b"[1]", b"NaN", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 10**5, b'"text"']


@pytest.mark.parametrize("content", [*ANY, *JSONS], ids=repr)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, content):
    spoilt(tmp_path / "file", content)
    for read in (read_json, read_text) if content in ANY[:6] else (read_json,):
        with pytest.raises(UserError, match=f"{tmp_path}/file .*{MEND}") as error:
            read(tmp_path / "file", MEND)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [*ANY, b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16], ids=repr)
@pytest.mark.parametrize("read", [read_npy, read_safetensors])
def test_a_file_that_is_no_array_is_one_line(tmp_path, content, read):
    spoilt(tmp_path / "file", content)
    with pytest.raises(UserError, match=f"{tmp_path}/file .*{MEND}") as error:
        read(tmp_path / "file", MEND)
    assert "\n" not in str(error.value)


def test_every_truncation_of_an_array_is_refused_and_its_order_of_bytes_does_not_matter(tmp_path):
    path, array = tmp_path / "a.npy", np.arange(6, dtype=">f4").reshape(2, 3)
    np.save(path, array)
    found = read_npy(path, MEND, 2)
    assert found.dtype.isnative and (found == array).all()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=MEND):
            read_npy(path, MEND)


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not numbers"):
        read_npy(tmp_path / "a.npy", MEND)


def test_json_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, "ü"]})
    assert read_json(tmp_path / "a.json", MEND) == {"a": [1, "ü"]}


def test_a_key_that_is_there_twice_with_two_values_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "b": {"c": 1, "c": 1}}')
    assert read_json(tmp_path / "a.json", MEND) == {"a": 1, "b": {"c": 1}}
    (tmp_path / "a.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(UserError, match="'c' is there twice.*make it again"):
        read_json(tmp_path / "a.json", MEND)
