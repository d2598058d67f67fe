"""What the documents say can be done: every command is parsed, and those of README.md and docs/ are
run (the long ones, at a small size, by -m slow); links lead somewhere, every setting has its line,
and the site is built.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import served
from conftest import save_tiny_data, save_tiny_pipeline

import concept_trak
from concept_trak import cli
from concept_trak.flags import SCRIPT_VARIABLES
from concept_trak.settings import ROOT, names

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "data/README.md", *sorted((ROOT / "experiments").glob("*/README.md"))]
# those whose links are followed; tables of experiments name what a full run will have left
LINKED = [page for page in PAGES if page.parent.parent.name != "experiments"]
STARTS = ("bash ", "python -m concept_trak ", "concept-trak ")
# What a newcomer and the tour call: run on pictures and a model of a few kilobytes.
TINY = ("concepts", "demo", "explore", "emoji/run_qual_free", "abc/run_own_data")
# {script: (variables, flags)} with which it is a matter of a minute or two
SMALL = {
    "cad/run_erase": ({"SCORE_SEEDS": 1, "GEN_NUM_INFERENCE_STEPS": 4}, ""),
    "emoji/run_eval": ({"METHODS": "concept_trak,caption_similarity", "NUM_QUERIES": 1}, ""),
    "emoji/run_suspects": ({}, ""),
    "truth/run_lies": ({"METHODS": "caption_similarity"}, ""),
    "truth/run_counterfactual": ({"METHODS": "caption_similarity"}, ""),
    "synthetic/run_all": ({"QUICK": 1}, ""),
    "build_index": ({}, ""),
    "bench": ({}, "--images 1 --repeats 1 --n 300 --k 64"),
}


def commands(page):
    """The commands in the fenced blocks of a page, comments left out, and in its inline code."""
    text = page.read_text("utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [block for language, block in fenced if language in ("", "bash", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    lines = [line.replace("\\|", "|") for line in lines]
    return [line for line in map(str.strip, lines) if bare(line).startswith(STARTS)]


def bare(line):
    """A command without the variables before it."""
    return re.sub(r"""^(?:[A-Z_]+=(?:"[^"]*"|'[^']*'|\S*)\s+)+""", "", line)


FOUND = [(page, line) for page in PAGES for line in commands(page)]
STARTING = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = dict.fromkeys(
    line.partition(" # ")[0].strip() for page in STARTING for line in commands(page)
)


def script_of(line):
    """ "emoji/run_eval" of a line that runs a script; "" of one that runs the program."""
    found = re.search(r"bash (?:scripts/)?(\S+)\.sh", line)
    return found[1] if found else ""


def test_the_documents_hold_commands():
    assert len(FOUND) > 40 and any("scripts/demo.sh" in line for _, line in FOUND)


@pytest.fixture(scope="module")
def verbs():
    (action,) = cli.parser()._subparsers._group_actions
    return action.choices


@pytest.mark.parametrize("page,line", FOUND, ids=lambda x: x.name if isinstance(x, Path) else x)
def test_a_command_names_scripts_verbs_and_settings_that_exist(page, line, verbs):
    words = shlex.split(line.replace("...", ""), comments=True)
    flags = {flag for verb in verbs.values() for flag in verb.complete()._option_string_actions}
    known = {name.upper() for name in names()} | {*SCRIPT_VARIABLES, "OMP_NUM_THREADS"}
    known |= {flag.lstrip("-").replace("-", "_").upper() for flag in flags}
    while re.match(r"[A-Z_]+=", words[0]):
        assert words[0].split("=")[0] in known, line
        words.pop(0)
    if words[0] == "bash":
        assert list(ROOT.glob(words[1])), f"{page.name} names {words[1]}"
        return
    words = words[3:] if words[0] == "python" else words[1:]
    if words and words[0].isupper() or words[0].startswith("-"):  # VERB, or a flag of the program
        return
    assert words[0] in verbs, line
    assert {w.split("=")[0] for w in words if w.startswith("--")} <= flags, line


def test_every_command_of_the_start_is_run_by_one_of_the_tests_below():
    # by tests of their own: one serves until it is stopped, one is asked for other machines, one
    # runs this very test
    elsewhere = {"serve", "emoji/run_train_grad", "test"}
    assert {script_of(line) for line in RUN} == {"", *TINY, *SMALL, *elsewhere}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Variables for pictures and a model that take no time, with the words of the documents."""
    root = tmp_path_factory.mktemp("tiny")
    words = ("cat", "rocket", "corgi"), ("blob", "openmoji line", "park")
    model = save_tiny_pipeline(root / "pipeline", objects=words[0], styles=words[1])
    data = save_tiny_data(root / "data", words[0], words[1])
    places = {"SD_MODEL_PATH": model, "DATA_DIR": data, "GRAD_DIR": root / "grads"}
    numbers = {"PROJ_DIM": 32, "NUM_SPLIT": 2, "NFE": 3, "EPOCHS": 2, "TOP_K": 3, "BATCH_SIZE": 8}
    numbers |= {"GEN_NUM_INFERENCE_STEPS": 4, "DEVICE": "cpu"}
    return places | {"RESULTS_DIR": root / "results"} | numbers


def test_what_the_start_and_the_tour_call_does_what_they_say(tiny, tmp_path_factory):
    root, folder = tiny["DATA_DIR"].parent, tmp_path_factory.mktemp("s")
    rows = run_verb_of(tiny, "train-grad")
    assert rows == 0
    pictures, done = sorted(root.glob("data/*.png"))[:4], {}
    (root / "my_pictures").mkdir()
    for picture in pictures:
        shutil.copy(picture, root / "my_pictures")
    told = (f"a corgi in {where}" for where in ("a park", "the snow", "a bag", "bed"))
    (root / "my_pictures/captions.txt").write_text("\n".join(told))
    for line in [line for line in RUN if script_of(line) in TINY]:
        asked = line.replace("my_pictures", str(root / "my_pictures"))
        asked = asked.replace("data/emoji/pipeline", str(tiny["SD_MODEL_PATH"]))
        own = "my_pictures" in line
        given = {k: v for k, v in tiny.items() if not (own and k in ("DATA_DIR", "GRAD_DIR"))}
        given |= {"DATA_DIR": root / "encoded", "GRAD_DIR": root / "own"} if own else {}
        done[line] = served.run(asked, folder, ROOT, **given)
        assert done[line].returncode == 0, (line, done[line].stdout, done[line].stderr)
    answers = [*(root / "results/free_query").glob("*/report.html")]
    prompts = {json.loads((a.parent / "question.json").read_text())["prompt"] for a in answers}
    assert prompts > {"a cat in the style of blob", "a corgi in a park"}
    for method in ("trak", "d_trak", "das"):
        assert [*(root / "results/free_query").glob(f"*/*/scores-{method}.npy")]
    assert "rocket" in done["bash scripts/concepts.sh"].stdout
    page = root / "results/explorer.html"
    assert str(page) in done["bash scripts/explore.sh"].stdout and page.stat().st_size > 10_000


def run_verb_of(variables, verb):
    """Exit code of a verb with variables as flags."""
    flags = [f"--{name.lower().replace('_', '-')}={value}" for name, value in variables.items()]
    return cli.main([verb, *flags])


def test_every_verb_tells_its_help(verbs, capsys):
    assert [line for line in RUN if line.endswith("VERB --help")]
    for verb in verbs:
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        told = capsys.readouterr().out
        assert not end.value.code and "--quiet" in told and told.splitlines()[0].count(verb)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in RUN if script_of(line) in SMALL])
def test_a_long_command_runs_at_a_small_size(line, tmp_path):
    variables, flags = SMALL[script_of(line)]
    places = {"RESULTS_DIR": tmp_path / "results", "WORK": tmp_path / "work"}
    env = os.environ | {k: str(v) for k, v in (places | variables).items()}
    env |= {"PYTHON_BIN": sys.executable}
    changes = ["git", "status", "--porcelain", "--untracked-files=no"]
    before = subprocess.run(changes, cwd=ROOT, capture_output=True, text=True).stdout
    done = subprocess.run(
        ["bash", "-c", f"{line} {flags}"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, (done.stdout[-2000:], done.stderr[-2000:])
    after = subprocess.run(changes, cwd=ROOT, capture_output=True, text=True).stdout
    assert after == before  # a small run leaves the figures of a full one alone


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, heading = link.partition("#")
        path = page.parent / unquote(name) if name else page
        assert path.exists(), f"{page.name} links to {link}"
        if heading and path.suffix == ".md" and page.parent in (ROOT, ROOT / "docs"):
            heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}
            assert heading in slugs, f"{page.name} links to {link}"


def test_every_setting_has_its_line_in_the_table_of_variables():
    table = (ROOT / "docs/variables.md").read_text("utf-8")
    rows = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    missing = {name.upper() for name in names()} - set(re.findall(r"`([A-Z_0-9]+)`", rows))
    assert not missing


def refuse_other_site(folder, verbs):
    """AssertionError where the first page, a verb, or the page of a package lacks."""
    page = (folder / "verbs/index.html").read_text("utf-8")
    assert all(f'id="{verb}"' in page for verb in verbs) and "--prompt TEXT" in page
    assert "Five minutes" in (folder / "index.html").read_text("utf-8")
    scoring = (folder / "api/scoring/index.html").read_text("utf-8")
    assert "concept_trak.scoring.ranking.ranking" in scoring and "equal" in scoring


@pytest.fixture
def mkdocs():
    pytest.importorskip("mkdocstrings", reason="no mkdocstrings: pip install -e .[docs]")
    return pytest.importorskip("mkdocs", reason="no mkdocs: pip install -e .[docs]")


def test_the_site_of_one_package_is_built_with_every_verb(mkdocs, tmp_path, verbs, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setattr(concept_trak, "LAYERS", ("scoring",))  # of which the API's pages are made
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # Abort, which is an exit, for a warning
    refuse_other_site(tmp_path, verbs)


@pytest.mark.slow
def test_the_site_is_built_with_every_verb_and_package(mkdocs, tmp_path, verbs):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refuse_other_site(tmp_path, verbs)
    assert all((tmp_path / f"api/{name}/index.html").exists() for name in concept_trak.LAYERS)
