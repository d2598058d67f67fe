"""The two download commands against a hub on localhost: layout, resume, checks, and every fault
ends in a recovery or in one clear line.
"""

import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from tqdm import TMonitor

from concept_trak import cli
from concept_trak.errors import UserError
from concept_trak.store.store import Layout, Store
from experiments import cli as of_experiments
from experiments.abc.download import archives, hub, transfer
from experiments.abc.download import folder as download_folder
from experiments.abc.download.parts import GEN_DATA, UNLEARNING
from experiments.abc.download.release import SETTINGS_NAME
from experiments.abc.download.release import SOURCE as RELEASE

py7zr = pytest.importorskip("py7zr")
REPO = Path(__file__).resolve().parents[3]
VOLUME = 1500
Usage = namedtuple("Usage", "total used free")
DIM, ROWS, COUNT = 8, 5, 3
STAND_IN = f"""#!{sys.executable}
import io, pathlib, sys, multivolumefile, py7zr
verb, first = sys.argv[1], pathlib.Path(sys.argv[-1])
try:
    with multivolumefile.open(first.with_suffix(""), "rb") as raw:
        with py7zr.SevenZipFile(io.BufferedReader(raw), "r") as archive:
            if verb == "l":
                print("Path = x\\nSize = 999\\n----------")
                for file in archive.list():
                    print(f"Path = {{file.filename}}\\nSize = {{file.uncompressed}}")
            else:
                archive.extractall(next(a for a in sys.argv if a.startswith("-o"))[2:])
                print(" 50%\\b\\b\\b\\b100%")
except Exception as error:
    sys.exit(f"ERROR: CRC Failed : {{error}}")
"""


def volumes_of(members, folder, name, volume=VOLUME):
    """{path on the hub: bytes} of a 7z archive of `members` {path: bytes}, cut in volumes."""
    whole = folder / "whole.7z"
    with py7zr.SevenZipFile(whole, "w", filters=[{"id": py7zr.FILTER_COPY}]) as archive:
        for path, data in members.items():
            archive.writestr(data, path)
    data = whole.read_bytes()
    return {
        f"{name}.7z.{i // volume + 1:03d}": data[i : i + volume]
        for i in range(0, len(data), volume)
    }


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """(both repositories, {path below DATA_DIR: bytes} they unpack to)."""
    folder, rng = tmp_path_factory.mktemp("assets"), np.random.default_rng(0)
    members = {
        "exemplar/exemplar": {
            "exemplar/artchive/images/a.jpg": rng.bytes(2500),
            "exemplar/bamfg/images/b.jpg": rng.bytes(300),
        },
        "synth_test/synth_test": {"synth/artchive/gpt/m/samples/00000.png": rng.bytes(1700)},
        "laion_subset/laion_subset": {
            "images/00000.jpg": rng.bytes(2000),
            "images/00001.jpg": rng.bytes(900),
            "captions.txt": b"one\ntwo\n",
        },
        "models_test/models_test": {"models_test/artchive/m/<new1>.bin": rng.bytes(1600)},
        "abc/laion_latents_text_embeddings": {
            "laion_latents.npy": rng.bytes(1600),
            "laion_text_embeddings.npy": rng.bytes(1800),
        },
    }
    small = {
        "json/test_artchive.json": b'[{"exemplar": []}]',
        "imagenet_class_to_categories.json": b"{}",
        "path_to_prompts.json": b"[1]",
    }
    gen, abu, final = (
        dict(small),
        {"abc/sd_fisher.pt": rng.bytes(3000), "README.md": b"no part of it"},
        dict(small),
    )
    gen |= {"json/full_artchive.json": b"not wanted", "synth_full/synth_full.7z.001": b"not wanted"}
    for name, content in members.items():
        (abu if name.startswith("abc/") else gen).update(volumes_of(content, folder, name))
        into = {"exemplar": "", "synth_test": "", "abc": "", "laion_subset": "laion_subset/"}.get(
            name.split("/")[0], ""
        )
        final |= {
            into + path.replace("models_test/", "models/"): data for path, data in content.items()
        }
    final["sd_fisher.pt"] = abu["abc/sd_fisher.pt"]
    return {GEN_DATA: gen, UNLEARNING: abu}, final


def quick_wait(naps):
    """Event.wait that takes no time and notes its seconds in `naps`; without a limit it waits."""
    wait = threading.Event.wait

    def quick(event, timeout=None):
        if timeout is None or isinstance(threading.current_thread(), TMonitor):
            return wait(event, timeout)  # the bars' thread would never rest
        naps.append(timeout)
        return wait(event, timeout and 0.001)

    return quick


@pytest.fixture
def server(assets, monkeypatch):
    """The hub, with no waits on the client's side; each is noted in `naps`."""
    with HubServer() as hub_server:
        hub_server.repos = {name: dict(files) for name, files in assets[0].items()}
        rng = np.random.default_rng(1)
        hub_server.repos[RELEASE] = {
            f"{SETTINGS_NAME}/train_grad-{i}.npy": rng.standard_normal((ROWS, DIM))
            .astype("<f4")
            .tobytes()
            for i in range(COUNT)
        }
        hub_server.naps = []
        monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(time, "sleep", hub_server.naps.append)
        monkeypatch.setattr(threading.Event, "wait", quick_wait(hub_server.naps))
        monkeypatch.setattr(hub, "CHUNK", 100)  # what a cut connection loses is at most a chunk
        monkeypatch.setattr(archives, "PROGRAMS", ())  # py7zr, whatever the machine has
        monkeypatch.setattr(download_folder, "SPARE", 0)
        # the parser of all verbs takes longer than a download here; the scripts use it below
        for module in (cli, of_experiments):
            monkeypatch.setattr(module, "VERBS", {})
        monkeypatch.setattr(of_experiments, "COMMANDS", ("abc.download.command",))
        yield hub_server


@pytest.fixture
def abc(server, tmp_path):
    """Call download-abc; the target is `abc.folder`."""

    def call(parts="", **more):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
        return cli.main(
            [
                "download-abc",
                f"--data-dir={call.folder}",
                f"--parts={parts}",
                "--max-workers=2",
                *flags,
            ]
        )

    call.folder = tmp_path / "abc"
    return call


@pytest.fixture
def grads(server, tmp_path):
    """Call download-train-grad with the small numbers; the target is `grads.folder`."""

    def call(**more):
        numbers = {
            "grad_root": tmp_path / "grads",
            "count": COUNT,
            "rows": ROWS,
            "dim": DIM,
            "max_workers": 2,
            **more,
        }
        return cli.main(
            [
                "download-train-grad",
                *(f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()),
            ]
        )

    call.folder = tmp_path / "grads" / SETTINGS_NAME
    return call


def refused(capfd, call, *args, **kwargs):
    """The one line of a call that must fail as a user's mistake does."""
    capfd.readouterr()
    assert call(*args, **kwargs) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def files_in(folder):
    """{path: bytes} of what is to be seen in a folder; links are not followed."""
    found = [p for p in folder.rglob("*") if not p.is_dir() and ".download" not in p.parts]
    assert not [p for p in found if p.is_symlink()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def hidden_files(folder):
    return sorted(
        str(p.relative_to(folder / ".download"))
        for p in (folder / ".download").rglob("*")
        if p.is_file()
    )


# ---- the benchmark's assets


def test_all_parts_end_in_their_layout_without_archives_and_are_not_fetched_twice(
    abc, assets, server, capfd
):
    assert abc() == 0
    assert files_in(abc.folder) == assets[1]
    assert hidden_files(abc.folder) == ["done.json"]
    wanted = {
        path
        for repo, files in assets[0].items()
        for path in files
        if "full" not in path and path != "README.md"
    }
    assert sorted(server.contents()) == sorted((path, 0) for path in wanted)  # each once, whole
    out = capfd.readouterr().out
    assert "laion_subset" in out and "disk needed at most" in out
    requests = len(server.log)
    assert abc() == 0 and len(server.log) == requests  # not even a listing


def test_chosen_parts_only_and_the_rest_later(abc, assets, server):
    assert abc("latents, json") == 0
    names = {p.name for p in abc.folder.iterdir()}
    small = {"json", "imagenet_class_to_categories.json", "path_to_prompts.json"}
    assert names == {".download", "laion_latents.npy", "laion_text_embeddings.npy", *small}
    assert abc() == 0 and files_in(abc.folder) == assets[1]
    assert len(server.contents()) == len(set(server.contents()))


def test_an_unknown_part_is_refused_with_the_known_ones(abc, server, capfd):
    message = refused(capfd, abc, "laion")
    assert (
        "PARTS" in message and "'laion'" in message and "laion_subset" in message and not server.log
    )


VOLUME_2 = "exemplar/exemplar.7z.002"


@pytest.mark.parametrize(
    "name,faults,starts",
    [
        (VOLUME_2, ["cut:700"], [0, 700]),
        (VOLUME_2, ["cut:700", "cut:150"], [0, 700, 800]),
        (VOLUME_2, ["wrong"], [0, 0]),
        (VOLUME_2, ["cut:700", "whole"], [0, 700]),
        (VOLUME_2, ["status:429"], [0, 0]),
        (VOLUME_2, ["limited:7"], [0, 0]),
        (VOLUME_2, ["status:503", "status:503", "status:500"], [0, 0, 0, 0]),
        (VOLUME_2, ["cut:700", "status:503"], [0, 700, 700]),
        (VOLUME_2, ["truncate:600"], [0, 600]),
        ("tree", ["status:503", "status:429"], None),
        ("info", ["status:503", "status:502"], None),
    ],
    ids=str,
)
def test_a_fault_that_passes_is_recovered_by_the_same_call(
    name, faults, starts, abc, assets, server
):
    server.faults[name] = list(faults)
    assert abc("exemplar") == 0
    assert files_in(abc.folder) == {
        path: data for path, data in assets[1].items() if path.startswith("exemplar/")
    }
    assert not server.faults[name]
    if starts:
        assert [start for path, start in server.contents() if path == name] == starts
    # what Retry-After, and the rate limit, say; and a second more, for they are rounded
    assert "status:429" not in faults or 2 in server.naps
    assert "limited:7" not in faults or 8 in server.naps


@pytest.mark.parametrize(
    "fault,words",
    [
        ("missing!", ["is not on", "run the same again"]),
        ("status:503!", ["503", "5 tries", "run the same again"]),
        ("wrong!", ["checksum", "proxy"]),
        ("truncate:600!", ["tries", "run the same again"]),
        ("cut:0!", ["tries", "run the same again"]),
        ("status:403!", ["403", "HF_TOKEN"]),
    ],
    ids=str,
)
def test_a_fault_that_lasts_is_one_line_and_the_next_call_fetches_only_the_rest(
    fault, words, abc, assets, server, capfd
):
    server.faults[VOLUME_2] = [fault]
    message = refused(
        capfd, abc, "json exemplar", max_workers=1
    )  # one worker: which files came before is then known
    assert VOLUME_2 in message and all(word in message for word in words), message
    assert not (abc.folder / "exemplar").exists()
    done = [path for path, _ in server.contents() if path != VOLUME_2]
    server.faults.clear()
    server.log.clear()
    assert abc("json exemplar") == 0
    assert {
        k: v for k, v in files_in(abc.folder).items() if k.startswith("exemplar")
    }.items() <= assets[1].items()
    again = [path for path, _ in server.contents()]
    assert len(done) == 4 and not set(done) & set(again) and VOLUME_2 in again


def test_a_begun_file_is_gone_on_with_by_the_next_call(abc, server, capfd):
    server.faults[VOLUME_2] = ["cut:700", "status:404"]
    refused(capfd, abc, "exemplar")
    assert abc("exemplar") == 0
    assert [start for path, start in server.contents() if path == VOLUME_2] == [0, 700, 700]


def test_a_begun_file_of_another_version_is_fetched_anew(abc, server, assets):
    part = abc.folder / ".download/incoming/.download+exemplar+exemplar.7z.002.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 400)
    assert abc("exemplar") == 0
    assert [start for path, start in server.contents() if path == VOLUME_2] == [400, 0]
    part.write_bytes(b"x" * 99999)  # longer than the file
    shutil.rmtree(abc.folder / "exemplar")
    assert abc("exemplar") == 0 and files_in(abc.folder).items() <= assets[1].items()


DYING = """
import os, signal, sys
from concept_trak import cli
from experiments import cli as of_experiments
from experiments.abc.download import hub, transfer

hub.CHUNK = 100
cli.VERBS, of_experiments.VERBS = {}, {}
of_experiments.COMMANDS = ("abc.download.command",)
write, calls = transfer.write_fully, []

def dying(fd, data):
    calls.append(fd)
    write(fd, data)
    if len(calls) == 25:
        os.kill(os.getpid(), signal.SIGKILL)

transfer.write_fully = dying
cli.main(sys.argv[1:])
"""


def test_a_killed_call_is_finished_by_the_next(abc, server):
    """A process of its own dies by SIGKILL in its second file; a fork would inherit locks that the
    server's threads hold.
    """
    command = [
        sys.executable,
        "-c",
        DYING,
        "download-abc",
        f"--data-dir={abc.folder}",
        "--parts=exemplar",
        "--max-workers=1",
    ]
    assert subprocess.run(command, cwd=REPO, timeout=100).returncode == -signal.SIGKILL
    assert abc("exemplar") == 0
    starts = [(path, start) for path, start in server.contents() if path.endswith(("001", "002"))]
    assert sorted(starts) == [("exemplar/exemplar.7z.001", 0), (VOLUME_2, 0), (VOLUME_2, 1000)]


def test_an_interrupt_ends_at_once_and_the_next_call_goes_on(abc, server, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download_folder.DownloadState, "_note", interrupted)
        assert abc("exemplar") == 130
    assert "run the same command again" in capfd.readouterr().err
    assert abc("exemplar") == 0


def test_a_gap_in_the_volumes_and_an_absent_part_are_told_before_anything_is_fetched(
    abc, server, capfd
):
    del server.repos[GEN_DATA][VOLUME_2]
    server.repos[GEN_DATA]["exemplar/exemplar.7z.003"] = b"later"
    assert "exemplar.7z.002" in refused(capfd, abc, "exemplar")
    server.repos[GEN_DATA] = {"README.md": b""}
    assert "exemplar/*" in refused(capfd, abc, "exemplar")
    assert not server.contents()


def test_too_little_disk_is_told_with_sizes_before_anything_is_fetched(
    abc, server, capfd, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**4, 0, 5000))
    message = refused(capfd, abc)
    assert "5.00kB are free" in message and "needs" in message and str(abc.folder) in message
    assert not server.contents()
    assert abc("json") == 0  # which fits


def test_disk_is_checked_again_with_the_true_unpacked_size(abc, server, capfd, monkeypatch):
    free = iter([10**6, 100])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 0, next(free, 10**6)))
    assert "unpacking exemplar needs 2.80kB" in refused(capfd, abc, "exemplar")
    fetched = len(server.contents())
    assert abc("exemplar") == 0 and len(server.contents()) == fetched


def test_a_full_disk_is_one_line(abc, server, capfd, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.abc.download.transfer.write_fully", full)
        assert "the disk is full" in refused(capfd, abc, "fisher")
    with monkeypatch.context() as patch:
        patch.setattr(py7zr.SevenZipFile, "extractall", full)
        assert "the disk is full" in refused(capfd, abc, "exemplar")
    fetched = [path for path, _ in server.contents() if "exemplar" in path]
    assert abc("exemplar fisher") == 0
    assert [path for path, _ in server.contents() if "exemplar" in path] == fetched


def test_a_disk_that_fills_while_the_program_unpacks_is_one_line(abc, capfd, monkeypatch, tmp_path):
    stand_in(tmp_path / "bin", monkeypatch)
    free = iter([10**6, 10**6, 100])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 0, next(free)))
    monkeypatch.setattr(
        archives, "_run_program", lambda *_: (_ for _ in ()).throw(RuntimeError("E_FAIL"))
    )
    assert "the disk is full" in refused(capfd, abc, "exemplar")


def test_without_a_tool_both_are_named_before_anything_is_fetched(abc, server, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capfd, abc, "exemplar")
    assert "pip install py7zr" in message and "7zz" in message and not server.log


def stand_in(folder, monkeypatch):
    """A `7zz` on the PATH that does as 7-Zip does."""
    folder.mkdir()
    (folder / "7zz").write_text(STAND_IN)
    (folder / "7zz").chmod(0o755)
    monkeypatch.setattr(archives, "PROGRAMS", ("7zz",))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("tool", ["py7zr", "program"])
def test_a_corrupted_archive_is_kept_and_told_and_not_fetched_again(
    tool, abc, server, assets, capfd, monkeypatch, tmp_path
):
    if tool == "program":
        stand_in(tmp_path / "bin", monkeypatch)
    good = dict(server.repos[GEN_DATA])
    damaged = bytearray(good[VOLUME_2])
    damaged[50] ^= (
        1  # in the content of a picture: what the hub holds is damaged, so its checksum agrees
    )
    server.repos[GEN_DATA][VOLUME_2] = bytes(damaged)
    for _ in range(2):
        message = refused(capfd, abc, "exemplar")
        assert "exemplar.7z.001" in message and "remove" in message and "CRC" in message.upper(), (
            message
        )
        assert (abc.folder / ".download/exemplar/exemplar.7z.002").read_bytes() == bytes(damaged)
        assert not (abc.folder / "exemplar").exists()
    assert len(server.contents()) == len(set(server.contents()))
    server.repos[GEN_DATA] = good
    shutil.rmtree(abc.folder / ".download/exemplar")  # what the message says
    assert abc("exemplar") == 0 and files_in(abc.folder).items() <= assets[1].items()


def test_an_archive_without_its_end_is_told(abc, server, capfd):
    last = max(path for path in server.repos[GEN_DATA] if path.startswith("exemplar/"))
    del server.repos[GEN_DATA][last]
    assert "cannot be unpacked" in refused(capfd, abc, "exemplar")


def test_program_is_used_if_there_is_one(abc, assets, monkeypatch, tmp_path):
    stand_in(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(archives, "_opened", None)  # py7zr must not be asked
    assert abc("laion_subset") == 0
    assert files_in(abc.folder) == {
        path: data for path, data in assets[1].items() if path.startswith("laion_subset")
    }


@pytest.mark.skipif(not any(map(shutil.which, archives.PROGRAMS)), reason="7-Zip is not installed")
def test_with_the_real_program(abc, assets, monkeypatch):
    monkeypatch.setattr(archives, "PROGRAMS", ("7zz", "7z", "7za"))
    assert abc() == 0 and files_in(abc.folder) == assets[1]


@pytest.mark.parametrize("wrapper", ["", "latents/", "data/abc/", "laion_latents_text_embeddings/"])
def test_an_archive_may_wrap_its_content_in_folders_or_not(wrapper, abc, server, tmp_path):
    members = {
        f"{wrapper}laion_latents.npy": b"1" * 2000,
        f"{wrapper}laion_text_embeddings.npy": b"2" * 2000,
    }
    name = "abc/sub/laion_latents_text_embeddings"  # a folder deeper on the hub
    server.repos[UNLEARNING] = volumes_of(members, tmp_path, name)
    assert abc("latents") == 0
    assert files_in(abc.folder) == {
        "laion_latents.npy": b"1" * 2000,
        "laion_text_embeddings.npy": b"2" * 2000,
    }


def test_an_archive_of_one_volume_and_one_with_other_content(abc, server, tmp_path, capfd):
    volumes = volumes_of(
        {"captions.txt": b"one\n", "images/0.jpg": b"x"},
        tmp_path,
        "laion_subset/laion_subset",
        volume=10**6,
    )
    server.repos[GEN_DATA] = {"laion_subset/laion_subset.7z": next(iter(volumes.values()))}
    assert abc("laion_subset") == 0 and set(files_in(abc.folder)) == {
        "laion_subset/captions.txt",
        "laion_subset/images/0.jpg",
    }
    server.repos[UNLEARNING] = volumes_of(
        {"other.npy": b"1"}, tmp_path, "abc/laion_latents_text_embeddings"
    )
    assert "other.npy" in refused(capfd, abc, "latents")


def test_a_move_that_was_killed_halfway_is_finished_by_the_next_call(
    abc, server, assets, monkeypatch
):
    replace = os.replace

    def dying(source, target):
        if str(target).endswith("laion_text_embeddings.npy"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        assert abc("latents") == 130
    assert (abc.folder / "laion_latents.npy").exists() and not (
        abc.folder / "laion_text_embeddings.npy"
    ).exists()
    requests = len(server.log)
    assert abc("latents") == 0 and len(server.log) == requests
    assert files_in(abc.folder).items() <= assets[1].items() and hidden_files(abc.folder) == [
        "done.json"
    ]


@pytest.mark.parametrize(
    "part,path",
    [
        ("exemplar", "exemplar/mine.jpg"),
        ("fisher", "sd_fisher.pt"),
        ("latents", "laion_latents.npy"),
    ],
)
def test_what_is_not_of_this_command_is_never_overwritten(part, path, abc, server, capfd):
    (abc.folder / path).parent.mkdir(parents=True)
    (abc.folder / path).write_bytes(b"mine")
    assert "move it away" in refused(capfd, abc, part)
    assert (abc.folder / path).read_bytes() == b"mine" and not server.contents()


def test_a_file_that_is_there_already_is_checked_instead_of_fetched(abc, assets, server):
    abc.folder.mkdir()
    (abc.folder / "sd_fisher.pt").write_bytes(assets[1]["sd_fisher.pt"])
    assert abc("fisher") == 0 and not server.contents()


def test_what_was_removed_or_truncated_later_is_fetched_again(abc, assets, server):
    assert abc("json exemplar") == 0
    shutil.rmtree(abc.folder / "exemplar")
    (abc.folder / "path_to_prompts.json").write_bytes(b"")
    server.log.clear()
    assert abc("json exemplar") == 0 and files_in(abc.folder).items() <= assets[1].items()
    assert {path.split("/")[0] for path, _ in server.contents()} == {
        "path_to_prompts.json",
        "exemplar",
    }


def test_a_second_process_is_refused_while_one_runs(abc, server, capfd):
    (abc.folder / ".download").mkdir(parents=True)
    fd = os.open(abc.folder / ".download", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert "is running" in refused(capfd, abc, "json")
    os.close(fd)
    assert abc("json") == 0


def test_a_damaged_record_is_named(abc, capfd):
    assert abc("json") == 0
    (abc.folder / ".download/done.json").write_text("{")
    assert "done.json" in refused(capfd, abc, "json")


def test_the_token_goes_to_the_hub_and_nowhere_else(abc, server, capfd, monkeypatch):
    server.token = "hf_secret"
    message = refused(capfd, abc, "fisher")
    assert "HF_TOKEN" in message and UNLEARNING in message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert abc("fisher") == 0
    assert {authorization for kind, _, _, authorization in server.log if kind != "content"} == {
        "Bearer hf_secret"
    }
    assert {authorization for kind, _, _, authorization in server.log if kind == "content"} == {
        None
    }  # another origin


@pytest.mark.parametrize(
    "endpoint,words", [("http://127.0.0.1:9", "HF_ENDPOINT"), ("hub", "HF_ENDPOINT=hub")]
)
def test_an_endpoint_that_is_none_is_one_line(endpoint, words, abc, server, capfd, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert words in refused(capfd, abc, "json")


@pytest.mark.parametrize("endpoint", ["", None])
def test_without_an_endpoint_it_is_the_hub(endpoint, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if endpoint is not None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub.Repo("a/b").endpoint == "https://huggingface.co"


def test_a_page_that_is_no_listing_is_one_line(abc, server, capfd, monkeypatch):
    monkeypatch.setattr(hub.Repo, "_page", lambda *_: json.loads("<html>"))
    assert "does not answer as a hub" in refused(capfd, abc, "json")


def changed_entry(**changes):
    """A listing whose first file is another one than it should be."""

    def change(entries, following, _):
        return [entries[0] | changes, *entries[1:]], following

    return change


OUTSIDE = ["json/test_x/../../../../evil.json", "../evil.json", "/tmp/evil.json", "json/test_/./a"]


@pytest.mark.parametrize(
    "path", [*OUTSIDE, "json//test_a", "", "json/test_\0", "json\\..\\a", 7, None]
)
def test_a_listing_that_names_a_path_outside_is_refused_before_anything_is_fetched(
    path, abc, server, capfd, tmp_path
):
    server.change_page = changed_entry(path=path)
    assert "does not answer as a hub" in refused(capfd, abc, "json")
    assert not server.contents() and not list(tmp_path.rglob("*evil*"))


def test_a_link_in_the_folder_does_not_lead_a_download_out_of_it(abc, server, capfd, tmp_path):
    abc.folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (abc.folder / "json").symlink_to(tmp_path / "elsewhere")
    assert "lies outside" in refused(capfd, abc, "json")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"size": None}, {"size": 1e3}, {"size": True}, {"oid": "../x"}, {"lfs": []}]
    + [{"lfs": {"oid": "0" * 63}}, {"type": 3}, {"oid": None}],
    ids=str,
)
def test_an_entry_that_cannot_be_is_one_line(changes, abc, server, capfd):
    server.change_page = changed_entry(**changes)
    if "type" not in changes and changes != {"lfs": []}:
        assert "does not answer as a hub" in refused(capfd, abc, "json")
        assert not server.contents()
    else:  # not a file; not a large one
        assert abc("json") in (0, 2)


NUMBERS = itertools.count()


def to_itself(entries, _, here):
    return entries, f"{here}?again"


def without_end(entries, _, here):
    number = next(NUMBERS)
    return [entries[0] | {"path": f"json/{number}"}], f"{here}?cursor=0&n={number}"


def empty_without_end(entries, _, here):
    return [], f"{here}?cursor=0&n={next(NUMBERS)}"


def elsewhere(entries, _, here):
    return entries, here.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize("change", [to_itself, without_end, empty_without_end, elsewhere])
def test_a_listing_that_does_not_end_or_leaves_the_hub_is_refused(
    change, abc, server, capfd, monkeypatch
):
    monkeypatch.setattr(hub, "MAX_PAGES", 30)
    server.change_page = change
    told = refused(capfd, abc, "json")
    assert "listing" in told or "twice" in told
    assert len([kind for kind, *_ in server.log if kind == "tree"]) <= 31


def test_more_bytes_than_listed_are_cut_off_at_once(abc, server, capfd):
    server.faults["path_to_prompts.json"] = ["longer:100000!"]
    assert "sends more than" in refused(capfd, abc, "json")
    assert len(server.contents()) <= 3 and "path_to_prompts.json" not in files_in(abc.folder)
    parts = abc.folder.glob(".download/incoming/path_to_prompts*")
    assert all(part.stat().st_size == 0 for part in parts)


def test_without_a_network_it_says_so_within_five_seconds(abc, server, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    begun = time.monotonic()
    assert "error: offline: 127.0.0.1 cannot be reached" in refused(capfd, abc, "json")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "record",
    ["[]", "{}", "3", '{"files": {"../x": {"size": 1, "digest": ""}}, "parts": {}, "moves": {}}']
    + ['{"files": {"x": 3}, "parts": {}, "moves": {}}', '{"files": {}, "parts": 3, "moves": {}}']
    + ['{"files": {}, "parts": {}, "moves": {"json": [["a", "../b"]]}}', "\0", ""],
)
def test_a_record_that_is_none_or_leads_outside_is_one_line(record, abc, capfd):
    (abc.folder / ".download").mkdir(parents=True)
    (abc.folder / ".download/done.json").write_text(record)
    assert "done.json" in (told := refused(capfd, abc, "json")) or "lies outside" in told


def test_offline_mode_is_one_line(abc, server):
    """In a process of its own: the library reads HF_HUB_OFFLINE when it is imported."""
    command = [sys.executable, "-m", "concept_trak", "download-abc", f"--data-dir={abc.folder}"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and not server.log
    assert done.stderr == "error: HF_HUB_OFFLINE is set; to download, unset HF_HUB_OFFLINE\n"


def test_a_token_that_may_not_be_sent_unasked_is_not(abc, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert abc("json fisher") == 0
    assert {authorization for _, _, _, authorization in server.log} == {None}


@pytest.mark.parametrize(
    "faults", [[], ["cut:700"], ["wrong"], ["whole"], ["truncate:600"]], ids=str
)
@pytest.mark.parametrize("here", [0, 400, 99999])
def test_the_bar_ends_at_the_size_of_the_file(here, faults, server, assets, tmp_path):
    """Whatever was here, and however it came."""
    server.faults[VOLUME_2] = list(faults)
    (file,) = (file for file in hub.Repo(GEN_DATA).files() if file.path == VOLUME_2)
    part, target, steps = tmp_path / "part", tmp_path / "target", [here]
    part.write_bytes(b"x" * here)
    transfer.fetch(file, part, target, steps.append, threading.Event())
    assert target.read_bytes() == assets[0][GEN_DATA][VOLUME_2] and not part.exists()
    assert sum(steps) == file.size == len(target.read_bytes())


# ---- the released gradients


def expected(server):
    return [
        np.frombuffer(server.repos[RELEASE][f"{SETTINGS_NAME}/train_grad-{i}.npy"], "<f4").reshape(
            ROWS, DIM
        )
        for i in range(COUNT)
    ]


def test_released_gradients_become_a_store_and_are_not_fetched_twice(grads, server):
    assert grads() == 0
    store = Store.open(grads.folder, {"dim": DIM})
    np.testing.assert_array_equal(store.rows(range(COUNT * ROWS)), np.concatenate(expected(server)))
    requests, written = len(server.log), (grads.folder / "manifest.json").stat().st_mtime_ns
    assert (
        grads() == 0
        and len(server.log) == requests
        and (grads.folder / "manifest.json").stat().st_mtime_ns == written
    )


def test_one_lost_shard_is_fetched_alone_and_a_lost_manifest_is_written_again(grads, server):
    assert grads() == 0
    server.log.clear()
    (grads.folder / "train_grad-1.npy").unlink()
    (grads.folder / "train_grad-2.npy").write_bytes(b"short")
    (grads.folder / "manifest.json").unlink()
    assert grads() == 0 and Store.open(grads.folder).num_rows == COUNT * ROWS
    assert sorted(server.contents()) == [(f"{SETTINGS_NAME}/train_grad-{i}.npy", 0) for i in (1, 2)]


def test_a_shard_changed_on_the_hub_gets_a_manifest_of_its_own(grads, server):
    assert grads() == 0
    name = f"{SETTINGS_NAME}/train_grad-1.npy"
    server.repos[RELEASE][name] = np.ones((ROWS, DIM), "<f4").tobytes()
    (grads.folder / "train_grad-1.npy").unlink()
    assert grads() == 0
    np.testing.assert_array_equal(Store.open(grads.folder).rows(range(ROWS, 2 * ROWS)), 1)


@pytest.mark.parametrize("fault", ["cut:60", "wrong", "status:429", "status:503", "truncate:40"])
def test_gradients_recover_from_faults(fault, grads, server):
    server.faults[f"{SETTINGS_NAME}/train_grad-1.npy"] = [fault]
    assert grads() == 0 and Store.open(grads.folder).num_rows == COUNT * ROWS


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"count": 4}, "train_grad-3.npy"),
        ({"count": 2}, "--count=3"),
        ({"rows": 6}, "160 bytes"),
        ({"dim": 16}, "--dim"),
        ({"path_in_repo": "nothing"}, f"{RELEASE}/nothing"),
        ({"hf_repo_id": "nobody/nothing"}, "nobody/nothing"),
        ({"hf_repo_id": "a b"}, "a b"),
        ({"max_workers": 0}, "MAX_WORKERS"),
        ({"repo_type": "disk"}, "--repo-type"),
    ],
)
def test_another_release_than_expected_is_told_before_anything_is_fetched(
    changes, words, grads, server, capfd
):
    assert words in refused(capfd, grads, **changes)
    assert not server.contents()


def test_too_little_disk_for_the_gradients(grads, server, capfd, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**4, 0, 100))
    assert "needs 480B" in refused(capfd, grads) and not server.contents()


def test_gradients_from_the_top_of_a_repository(grads, server):
    server.repos[RELEASE] = {
        path.rpartition("/")[2]: data for path, data in server.repos[RELEASE].items()
    } | {"heuristic_lamb.pt": b"x"}
    assert grads(path_in_repo=".") == 0
    assert set(files_in(grads.folder)) == {
        "manifest.json",
        *(f"train_grad-{i}.{end}" for i in range(COUNT) for end in ("npy", "json")),
    }


def test_gradients_computed_here_are_never_overwritten(grads, server, capfd):
    layout = Layout(COUNT * ROWS, DIM, COUNT, "float32")
    Store.create(grads.folder, layout, {"made": "here"}, provenance={})
    assert "GRAD_ROOT" in refused(capfd, grads) and not server.log


def test_a_value_that_is_not_finite_is_told(grads, server, capfd):
    server.repos[RELEASE][f"{SETTINGS_NAME}/train_grad-2.npy"] = np.full(
        (ROWS, DIM), np.nan, "<f4"
    ).tobytes()
    assert "NaN" in refused(capfd, grads)


# ---- the scripts


def script(name, tmp_path, *arguments, **env):
    """Run a script with a home of its own; returns what it printed."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", REPO / "scripts/abc" / name, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHON_BIN": sys.executable,
            "no_proxy": "*",
            **env,
        },
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not list(home.rglob("*"))  # no second copy in a cache
    return done.stdout


def test_both_scripts_end_to_end(server, assets, tmp_path):
    server.faults[VOLUME_2] = ["status:503"]
    env = {"HF_ENDPOINT": server.url, "MAX_WORKERS": "3"}
    numbers = [f"--count={COUNT}", f"--rows={ROWS}", f"--dim={DIM}"]
    with ThreadPoolExecutor() as pool:
        assets_job = pool.submit(
            script,
            "run_download.sh",
            tmp_path,
            DATA_DIR=str(tmp_path / "abc"),
            PARTS="exemplar latents",
            **env,
        )
        out = script(
            "download_train_grad.sh",
            tmp_path,
            *numbers,
            GRAD_ROOT=str(tmp_path / "grads"),
            HF_REPO_ID="",
            **env,
        )
        assets_job.result()
    assert (
        len(files_in(tmp_path / "abc")) == 4
        and files_in(tmp_path / "abc").items() <= assets[1].items()
    )
    assert Store.open(tmp_path / "grads" / SETTINGS_NAME).num_rows == COUNT * ROWS
    assert out.splitlines()[-1].endswith(f"{COUNT * ROWS} rows of {DIM}")


def test_volumes_are_ordered_by_number():
    names = [f"a.7z.{i:03d}" for i in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert archives.volumes([*names, "b.7z", "c.txt"]) == {"a.7z": sorted(names), "b.7z": ["b.7z"]}
    with pytest.raises(UserError, match="a.7z.001"):
        archives.volumes(["a.7z.002"])
