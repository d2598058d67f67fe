"""A refusal ends in what to run: the line is one that bash reads, of a script that is there, with
variables that it knows. Where no line can mend it, it ends in what to change: which variable, flag,
argument, or file of the user's own. Every refusal of the package is read from the source for that.
"""

import re
import shlex
import subprocess
from dataclasses import asdict

import pytest
from refusals import Source

from concept_trak import cli
from concept_trak.atomic_io import write_json
from concept_trak.attribution.preflight import check_rows
from concept_trak.components.edits import load_edit
from concept_trak.components.score_io import load_scores
from concept_trak.datasets import encoded
from concept_trak.datasets.prepare import prepare
from concept_trak.errors import UserError, script_hint
from concept_trak.flags import SCRIPT_VARIABLES
from concept_trak.settings import ROOT, TOKEN, names, resolve
from experiments.abc import tasks
from experiments.abc.evaluate import token_path
from experiments.attributes.celeba import read_list
from experiments.attributes.command import OWN
from experiments.attributes.pipeline import AttributeBenchmark, TrainedModel
from experiments.attributes.settings import BENCHES, of_bench
from experiments.emoji.abc.tasks import REMEDY
from experiments.emoji.classifier.io import load_judge
from experiments.emoji.classifier.net import class_indices
from experiments.truth.subsets import read_plan, retrain_line

TASK = tasks.Task("synth/a/gpt/b/0.png", f"a {TOKEN}", "test", 0, "models/a/b", f"{TOKEN} x", "art")
LINE = re.compile(r"(?:[A-Z_]+=(?:'[^']*'|[^\s',;])+ )*bash scripts/[\w/]+\.sh\b")
VARIABLE = re.compile(r"\b[A-Z][A-Z_0-9]+\b")

# ---- what a text may end in
RUN = re.compile(
    r"(?:bash (?:scripts/\S+(?: my_pictures)?|requirements\.sh)"
    r"|python (?:-m \S+|-c \".*\"(?: \S+)*)|pip install (?:-e )?\S+|curl -LO \S+"
    r"|git checkout -- \S+|git pull|rm (?:-r )?\S+|conda env remove .*|\{option\}\{.*\}|unset \S+)$"
)
DO = re.compile(
    r"\b(?:set|unset|lower|raise|write|give|leave|name|use|remove|shorten|mend|make|choose|run)\b"
)
AGAIN = re.compile(r"\brun the same again\b")  # what was run, after what stands before is done
FLAG = re.compile(r"(?<!\w)--[a-z{][\w{-]*")
UNKNOWN = re.compile(r"\{(?:variable|name|name\.upper\(\))\}")  # a variable that a run knows
OWN_FILE = re.compile(  # the user's own data: no line can know its captions
    r"\b(?:write|put|mend|remove|leave|move)\b.*"
    r"(?:\w\.(?:jsonl|csv|txt|tsv|json)\b|\{path\.name\}|\{root\})"
)
# What the service answers: whoever asked cannot change its variables or files, but the request: a
# field of the question, or what to send instead.
ANSWERS = tuple(
    f"concept_trak/service/{n}.py" for n in ("request_schema", "html", "response_schema")
)
FIELDS = {*names(), "concepts", "thumbnails"}  # of a question, most of them are settings
SENT = re.compile(r"\b(?:GET|POST) /\w+$")
# Texts that end in another refusal's, or to which their one caller adds the line.
PASSED_ON = {
    ("concept_trak/attribution/task.py", "{told}"),
    ("concept_trak/attribution/multi_gpu.py", "{last_line(log)}"),
    ("concept_trak/models/learned_tokens.py", "{error}"),
    ("concept_trak/report/component_section.py", "{error}"),
}
# scripts that take long, and so are named with how long, or how much they fetch
LONG = re.compile(r"bash scripts/(?:truth/|emoji/(?:run_)?train_|abc/run_ti|abc/(?:run_)?download)")
TIME = re.compile(r"\b(?:hours?|minutes?|steps|GB|min)\b|\{SIZES\[part\]\}|\{told\}")


def bench(folder, name="synthetic_4x4", **given):
    return AttributeBenchmark(
        of_bench(name, {"work": str(folder), **given}), resolve("emoji", {}), "cpu"
    )


def no_task(folder):
    write_json(folder / "tasks.json", [asdict(TASK) | {"prompt": 3}])
    tasks.read_tasks(folder / "tasks.json")


def no_captions(folder):
    (folder / "laion_subset/images").mkdir(parents=True)
    (folder / "laion_subset/images/0.png").touch()
    (folder / "laion_subset/captions.txt").touch()
    encoded._laion(folder / "laion_subset", 1)


REFUSALS = {
    "no tasks": lambda folder: tasks.read_tasks(folder / "tasks.json"),
    "a task of the wrong form": no_task,
    "no release": lambda folder: tasks.entries_of(folder, "test"),
    "no prompts": tasks.make_tasks,
    "no token": lambda folder: token_path(resolve("abc", {"data_dir": str(folder)}), TASK),
    "no latents": lambda folder: encoded._array(folder / encoded.LATENTS, 4),
    "no pictures of the release": lambda folder: encoded._laion(folder / "laion_subset", 1),
    "no captions of the release": no_captions,
    "no folder to encode": lambda folder: prepare(
        resolve("own", {"data_dir": str(folder)}), device="cpu"
    ),
    "no rows": lambda folder: check_rows(resolve("emoji", {"grad_dir": str(folder), "nfe": 4})),
    "no judge": load_judge,
    "a word that the judge does not know": lambda _: class_indices(["x"], ["y"], "object"),
    "no scores of weights": load_scores,
    "no edit": lambda folder: load_edit(folder / "edit.safetensors"),
    "no faces": lambda folder: read_list(folder, ("Smiling",)),
    "no labelled pictures": lambda folder: bench(folder).labelled,
    "no labelled model": lambda folder: bench(folder).task(TrainedModel("unet", 0)),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_ends_in_a_line_that_can_be_run(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # scripts are told by their path from here
    folder = tmp_path / "with a space"
    folder.mkdir()
    with pytest.raises(UserError) as error:
        REFUSALS[refusal](folder)
    told = str(error.value)
    assert "\n" not in told
    lines = LINE.findall(told)
    assert lines and told.rstrip(".").endswith(lines[-1]), told
    for line in lines:
        refuse_other_line(line)


def refuse_other_line(line):
    """AssertionError for a line that bash cannot read, of no script, or with unknown variables."""
    assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0, line
    *given, shell, script = shlex.split(line)
    assert shell == "bash" and (ROOT / script).is_file(), line
    shared = (ROOT / "scripts/lib.sh").read_text()
    known = set(VARIABLE.findall(shared + (ROOT / script).read_text()))
    assert {text.partition("=")[0] for text in given} <= known, line


@pytest.mark.parametrize("plan", ["base", "counterfactual", "hidden", "lds", "lies"])
def test_the_models_of_every_plan_have_a_line_that_trains_them(plan, tmp_path):
    usual = retrain_line(plan, resolve("emoji", {}).truth_dir)
    assert "RETRAIN=1" in usual and "TRUTH_DIR" not in usual
    refuse_other_line(usual)
    assert f"TRUTH_DIR={tmp_path}" in retrain_line(plan, tmp_path)


def test_a_damaged_plan_names_what_brings_it_back(tmp_path):
    (tmp_path / "lds.json").write_text("{")
    with pytest.raises(UserError, match=r"git checkout -- \S+lds.json"):
        read_plan(tmp_path / "lds.json", None)


def test_the_exemplars_are_built_by_a_module_that_is_there():
    *_, module = re.findall(r"-m (\S+)", REMEDY)
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("name", BENCHES)
def test_the_line_of_a_labelled_bench_gives_its_settings_again(name, tmp_path):
    own = of_bench(name, {"work": str(tmp_path / "it's"), "steps": 7, "held_out": "a b|c d"})
    *given, _, script = shlex.split(own.line("train", RETRAIN=1))
    values = dict(text.split("=", 1) for text in given)
    assert (values.pop("STAGE"), values.pop("RETRAIN")) == ("train", "1")
    assert values.pop("BENCHES", own.bench) == name and own.home in script
    kinds = {key: type(getattr(own, key)) for key in OWN}
    again = {key.lower(): kinds[key.lower()](value) for key, value in values.items()}
    assert of_bench(name, again) == own


def test_values_that_bash_would_read_otherwise_are_quoted():
    line = script_hint("demo.sh", PROMPT='it\'s $HOME; a "cat"')
    told, *_ = shlex.split(line)
    assert told == 'PROMPT=it\'s $HOME; a "cat"'


@pytest.fixture(scope="module")
def refusals():
    """[(site, text)]: every text that a refusal of the package may have."""
    source = Source()
    assert len(source.sites) > 300
    return [(s, text) for s in source.sites for text in source.texts(s.message, s.around)]


@pytest.fixture(scope="module")
def variables():
    """Names of variables that a user can set."""
    (action,) = cli.parser()._subparsers._group_actions
    flags = {f for verb in action.choices.values() for f in verb.complete()._option_string_actions}
    known = {name.upper() for name in names()} | {*SCRIPT_VARIABLES, "HF_ENDPOINT", "HF_TOKEN"}
    return known | {flag.lstrip("-").replace("-", "_").upper() for flag in flags}


def last_part(text):
    """What follows the last semicolon, or, if there is none, the last colon."""
    return text.rpartition("; " if "; " in text else ": ")[2]


def mends(text, parameters, variables):
    """Whether a text ends in what to run or to change."""
    part = last_part(text)
    named = (
        DO.search(part)
        and set(re.findall(r"\b[A-Z][A-Z_0-9]*\b", re.sub(r"\{.*?\}", "", part))) & variables
    )
    forms = (AGAIN, FLAG, UNKNOWN, OWN_FILE)
    given = any(re.search(rf"\b(?:give|call|leave|rename|in)\b.*\b{p}\b", part) for p in parameters)
    return bool(RUN.search(text) or named or given or any(form.search(part) for form in forms))


def mends_request(text):
    """Whether an answer of the service ends in what to change of the request."""
    part = last_part(text)
    field = DO.search(part) and set(re.findall(r"\b[a-z_]+\b", part)) & FIELDS
    return bool(field or SENT.search(text))


def test_every_refusal_of_the_package_ends_in_what_to_run_or_to_change(refusals, variables):
    bad, passed_on = [], set()
    for site, text in refusals:
        if (site.path, last_part(text)) in PASSED_ON:
            passed_on.add((site.path, last_part(text)))
        elif site.path in ANSWERS and mends_request(text):
            continue
        elif not mends(text, site.parameters(), variables):
            bad.append(f"{site.path}:{site.line}: {text}")
    assert not bad, "\n".join(bad)
    assert passed_on == PASSED_ON


def test_every_refusal_of_the_scripts_does_so_too(variables):
    found = {}
    for path in [*(ROOT / "scripts").rglob("*.sh"), ROOT / "requirements.sh"]:
        source = re.sub(r'" \\\n\s*"', " ", path.read_text())  # a text over several lines
        shown = {f"${k}": v for k, v in re.findall(r"^(\w+)='(.*)'$", source, re.M)}
        for text in re.findall(r'\bdie "((?:[^"\\]|\\.)*)"', source):
            for name, value in shown.items():
                text = text.replace(name, value)
            found[path.name, text] = path
    assert len(found) > 10
    more = variables | {"PATH", "GRAD_ROOT"}
    bad = [f"{name}: {text}" for name, text in found if not mends(text, (), more)]
    assert not bad, "\n".join(bad)


def test_a_line_that_takes_long_says_how_long(refusals):
    bad = [
        f"{site.path}:{site.line}: {text}"
        for site, text in refusals
        if LONG.search(last_part(text)) and not TIME.search(text)
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text",
    [
        "DAMPING=7 is not one of the sweep 0.1, 1",
        "the store is damaged; make it again",
        "no rows in {folder}: run the train gradients first",
        "{path} is missing; it is made again",
        "the judge is missing; bash scripts/emoji/train_judge.sh, which takes long",
        "k = {k}: recall needs more",
    ],
)
def test_a_text_that_leaves_the_user_alone_is_noticed(text, variables):
    assert not mends(text, {"k", "name"}, variables)


def test_an_answer_of_the_service_ends_in_what_to_change_of_the_request():
    for told in ("two are the same; give concepts that differ", "is gone; ask again: POST /x"):
        assert mends_request(told)
    for told in ("two are the same; ask with other words", "concepts are the same", "see the log"):
        assert not mends_request(told)
