"""The library as others install it: the wheel holds every file of it, and its command works in a
fresh environment, without the checkout's code.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".*", "data", "experiments", "build", "dist", "__pycache__", "*.egg-info"
)


def run(*command, cwd, **env):
    """Standard output of a command that must succeed; the checkout is not on its path."""
    env = {"PIP_NO_INPUT": "1", "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", **env}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout gets no build folder."""
    tree, out = tmp_path_factory.mktemp("wheel") / "tree", tmp_path_factory.mktemp("dist")
    shutil.copytree(REPO, tree, ignore=NOT_COPIED)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, ".", cwd=tree)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The `bin` folder of an environment with the wheel and the third-party packages of this one.

    Those come by one line of a .pth file. Such files in the named folder are not read in turn, so
    an editable install of the checkout stays invisible.
    """
    env = tmp_path_factory.mktemp("fresh") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=env.parent)
    python = env / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=env)
    [packages] = env.glob("lib/python*/site-packages")
    (packages / "third-party.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    found = run(python, "-c", "import concept_trak; print(concept_trak.__file__)", cwd=env)
    assert Path(found.strip()).is_relative_to(packages)
    return env / "bin"


def test_the_wheel_holds_every_file_of_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    library = {str(p.relative_to(REPO)) for p in REPO.glob("concept_trak/**/*") if p.is_file()}
    want = {name for name in library if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == want
    assert any(name.startswith("concept_trak/report/templates/page.html") for name in names)


def test_the_installed_command_attributes_from_an_empty_folder(fresh, tmp_path):
    folder, results = tmp_path / "empty", tmp_path / "results"
    folder.mkdir()
    flags = [f"--data-dir={REPO / 'data/emoji'}", f"--results-dir={results}", "--device=cpu"]
    flags += ["--epochs=2", "--gen-num-inference-steps=4"]
    told = run(fresh / "concept-trak", "attribute", *flags, cwd=folder, HF_HUB_OFFLINE="1")
    [report] = results.rglob("report.html")
    assert report.stat().st_size > 10_000 and os.path.relpath(report, folder) in told
    assert not list(folder.iterdir())


def test_the_example_of_the_readme_runs_from_python_in_an_empty_folder(fresh, tmp_path):
    (tmp_path / "data").symlink_to(REPO / "data")  # its paths are those of the repository
    [example] = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    told = run(fresh / "python", "-c", example, cwd=tmp_path, HF_HUB_OFFLINE="1")
    ranked = re.findall(r"^(\d) (\S+) (.*)$", told, re.M)
    assert [rank for rank, _, _ in ranked] == ["1", "2", "3", "4", "5"]
    assert sum("rocket" in caption for *_, caption in ranked) >= 4, told
    assert [float(s) for _, s, _ in ranked] == sorted(
        (float(s) for _, s, _ in ranked), reverse=True
    )
    [page] = re.findall(r"^.*report.html$", told, re.M)
    assert (tmp_path / page).is_file() and (tmp_path / "edited.png").is_file()
