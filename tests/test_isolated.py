"""Code is found where the interpreter's and the package's lie, and in no folder of pictures."""

import json
import os
import subprocess
import sys

import pytest

from concept_trak import cli, isolated
from concept_trak.attribution import multi_gpu
from concept_trak.settings import ROOT, Settings

# what a start imports first, what it imports later, and what site imports by itself
NAMES = (
    *("numpy", "json", "torch", "concept_trak", "sitecustomize", "usercustomize", "argparse"),
    *("runpy", "site", "PIL", "accelerate", "multiprocessing", "typing", "pkgutil", "tqdm"),
)
# What a process of ours, and one that it starts, may import and must not see.
PROBE = """
import json, multiprocessing, os, subprocess, sys

def told(queue=None):
    found = {"path": sys.path, "isolated": sys.flags.isolated, "optimize": sys.flags.optimize}
    found["shown"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    found |= {"ranks": os.environ.get("WORLD_SIZE", "1"), "python_path": os.environ["PYTHONPATH"]}
    return found if queue is None else queue.put(found)

if __name__ == "__main__":
    queue = (context := multiprocessing.get_context("spawn")).Queue()
    child = context.Process(target=told, args=(queue,))
    child.start()
    print(json.dumps([told(), queue.get()]))
    child.join()
"""


@pytest.fixture
def planted(tmp_path):
    """A folder that holds a module of every name, each of which leaves its mark."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    return folder


def ran(planted):
    mark = planted.parent / "ran"
    return mark.read_text() if mark.exists() else ""


def run(command, planted, **env):
    """As a process in the planted folder, which an empty item of PYTHONPATH names, too."""
    items = os.pathsep.join(["", ".", "relative", str(planted), str(planted.parent)])
    env = os.environ | {"PYTHONPATH": items, "PYTHONOPTIMIZE": "2"} | env
    return subprocess.run(
        command, cwd=planted, env=env, capture_output=True, text=True, timeout=120
    )


def test_a_process_and_what_it_starts_see_no_folder_of_the_users(planted):
    (planted.parent / "probe.py").write_text(PROBE)
    done = run(isolated.command("probe"), planted)
    assert not ran(planted) and done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert not {"", ".", str(planted)} & {*found["path"]}
        assert str(planted.parent) in found["path"], "which was named whole"
        assert found["isolated"] and not found["optimize"]
        assert found["python_path"].split(os.pathsep) == [str(ROOT), str(planted.parent)]


def test_no_script_runs_what_lies_in_the_working_folder_the_data_or_beside_it(planted, tmp_path):
    """In a checkout whose folder of scripts holds planted files, too."""
    scripts = tmp_path / "checkout/scripts"
    scripts.mkdir(parents=True)
    for name in (
        "concept_trak",
        "experiments",
        "pyproject.toml",
        "constraints.txt",
        "environment.yml",
    ):
        (scripts.parent / name).symlink_to(ROOT / name)
    for name in ("lib.sh", "concepts.sh"):
        (scripts / name).write_text((ROOT / "scripts" / name).read_text())
    for name in NAMES:
        (scripts / f"{name}.py").symlink_to(planted / f"{name}.py")
    (planted / "captions.txt").write_text("a cat\n")
    (planted / "a.png").write_bytes(b"")
    done = run(["bash", scripts / "concepts.sh"], planted, PYTHON_BIN=sys.executable, DATA_DIR=".")
    assert done.returncode == 0 and "cat (1)" in done.stdout, done.stderr
    assert not ran(planted)


@pytest.mark.parametrize("start", [lambda: cli.main(), isolated.isolate])
def test_the_installed_script_and_the_module_go_on_isolated(monkeypatch, start):
    def replaced(program, command):
        raise SystemExit([program, *command])

    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr(sys, "argv", ["concept-trak", "concepts", "--data-dir=x"])
    with pytest.raises(SystemExit) as ended:
        start()
    program, *command = ended.value.code
    assert program == command[0] == sys.executable and command[1] == "-I"
    assert command[-3:] == ["concept_trak", "concepts", "--data-dir=x"]


@pytest.mark.parametrize(
    "given, kept",
    [
        ("", []),
        (":", []),
        (":/", ["/"]),
        (".:..:lib:/:/usr", ["/", "/usr"]),
        ("/no/such", ["/no/such"]),
        ("{here}:/", ["/"]),
        ("{here}/../{name}", []),
        ("{here}/link:/:/", ["/"]),
        (f"{ROOT}:/", ["/"]),
    ],
)
def test_of_pythonpath_stay_the_folders_that_are_named_whole(monkeypatch, tmp_path, given, kept):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", given.format(here=tmp_path, name=tmp_path.name))
    assert isolated.python_path() == [str(ROOT), *kept]


def test_a_shard_is_isolated_on_its_gpu_alone_whatever_accelerate_was_told(planted, monkeypatch):
    """Its command, with a program in the shard's place that says what it sees."""
    (planted.parent / "probe.py").write_text(PROBE)
    config = planted.parent / "hf/accelerate/default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("distributed_type: MULTI_GPU\ngpu_ids: all\nnum_processes: 4\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5f")
    line = multi_gpu.command(Settings(), 0, "1")
    line = [*line[: line.index("concept_trak")], "probe"]
    done = run(line, planted, HF_HOME=str(config.parents[1]), ACCELERATE_USE_FSDP="true")
    assert not ran(planted) and done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert (found["shown"], found["ranks"], found["isolated"]) == ("GPU-5f", "1", 1)
        assert not {"", str(planted)} & {*found["path"]}
