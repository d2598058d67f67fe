"""What the documents say can be done: every command is parsed, quick ones are run, links lead
somewhere, every setting has its line, and the site is built.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from concept_trak import cli
from concept_trak.flags import OF_SCRIPTS
from concept_trak.settings import ROOT, names

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "data/README.md", *sorted((ROOT / "experiments").glob("*/README.md"))]
# those whose links are followed; tables of experiments name what a full run will have left
LINKED = [page for page in PAGES if page.parent.parent.name != "experiments"]
STARTS = ("bash ", "python -m concept_trak ", "concept-trak ")
QUICK = ("scripts/concepts.sh",)  # run as they stand; the others take a model, a network, or hours


def commands(page):
    """The commands in the fenced blocks of a page, comments left out, and in its inline code."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S)
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
    known = {name.upper() for name in names()} | {*OF_SCRIPTS, "OMP_NUM_THREADS"}
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


@pytest.mark.parametrize("script", QUICK)
def test_a_quick_command_runs_as_it_stands(script):
    lines = {line for _, line in FOUND if script in line and "my_pictures" not in line}
    assert lines
    for line in lines:
        env = os.environ | {"PYTHON_BIN": sys.executable}
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr


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


def test_the_site_is_built_with_every_verb_and_room(tmp_path, verbs):
    pytest.importorskip("mkdocs", reason="no mkdocs: pip install -e .[docs]")
    pytest.importorskip("mkdocstrings", reason="no mkdocstrings: pip install -e .[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "verbs/index.html").read_text("utf-8")
    assert all(f'id="{verb}"' in page for verb in verbs) and "--prompt TEXT" in page
    assert "Five minutes" in (tmp_path / "index.html").read_text("utf-8")
    scoring = (tmp_path / "api/scoring/index.html").read_text("utf-8")
    assert "concept_trak.scoring.ranking.ranking" in scoring and "equal" in scoring
