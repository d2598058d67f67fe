"""The tasks of AbC: a prompt with a token <new1> that was learned from exemplars; which pictures
are the exemplars?

    {"synth_image_path": "synth/artchive/gpt/african/samples/00000.png",
     "prompt": "... in the style of <new1> art", "category": "art",
     "test_case": "test_artchive", "test_case_ind": 0, "model_path": "models/artchive/african",
     "train_prompt": "A picture in the style of <new1> art"}

400 tasks are published with "Data Attribution for Text-to-Image Models by Unlearning Synthesized
Images" (Wang et al. 2024); `make_tasks` builds the same list from the JSON files of the AbC
release: of 5 models a test case every fourth picture of both prompt kinds. Exemplars of a model:
json/{test_case}.json, entry `test_case_ind`, key "exemplar".
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from concept_trak.atomic_io import disk_errors, write_json
from concept_trak.errors import UserError, script_hint
from concept_trak.parsing import parse_numbers
from concept_trak.settings import TOKEN, Settings
from concept_trak.validated_io import read_json, safe_join

MODELS = {  # entries of json/{test_case}.json that the published tasks use
    "test_artchive": (0, 1, 2, 3, 4),
    "test_bamfg": (0, 1, 2, 3, 4),
    "test_unobserved_imagenet": (0, 20, 70, 180, 210),
    "test_observed_imagenet": (11, 12, 17, 18, 19),
}
EVERY = 4  # the four pictures of a prompt follow one another; the first is asked about
SIZES = {"json": "plain files", "exemplar": "about 17 GB"}  # of parts of the release


@dataclass(frozen=True)
class Task:
    """One query of the benchmark; fields as in the module docstring."""

    synth_image_path: str
    prompt: str
    test_case: str
    test_case_ind: int
    model_path: str
    train_prompt: str
    category: str

    @property
    def seed(self) -> int:
        """Of the query's x_T: the number of its picture (the reference's choice)."""
        return int(Path(self.synth_image_path).stem)

    @property
    def negative_prompt(self) -> str:
        """The prompt without the token: what the concept is contrasted with."""
        return re.sub(rf"\s*{re.escape(TOKEN)}\s*", " ", self.prompt).strip()


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of a JSON file. UserError when it is missing, or an entry lacks a field or TOKEN,
    or has one that it cannot have.
    """
    path = Path(path)
    entries = read_json(path, f"give another TASK_JSON, or make it: {_line_for(path)}", list)
    mend = f"mend the file, or make it again: {_line_for(path)}"
    return [_task(f"{path}, task {number}", entry, mend) for number, entry in enumerate(entries)]


def _line_for(path: Path) -> str:
    return script_hint("abc/make_tasks.sh", TASK_JSON=path)


def fetch(root: Path, part: str = "json") -> str:
    """What brings a part of the release to DATA_DIR."""
    return (
        f"fetch it ({SIZES[part]}): {script_hint('abc/run_download.sh', DATA_DIR=root, PARTS=part)}"
    )


def _task(where: str, entry: Any, mend: str) -> Task:
    """A task of the file. UserError, which ends with `mend`, for one that is none."""
    known = entry if isinstance(entry, dict) else {}
    values = {field.name: known.get(field.name) for field in fields(Task)}
    index = values.pop("test_case_ind")
    fault = next((name for name, value in values.items() if not isinstance(value, str)), None)
    if type(index) is not int or index < 0:
        fault = "test_case_ind"
    elif fault is None and not re.fullmatch(r"[0-9]{1,9}", Path(values["synth_image_path"]).stem):
        fault = "synth_image_path"
    if fault is not None:
        raise UserError(f"{where}: {fault} is {str(known.get(fault))[:80]!r}; {mend}")
    task = Task(**values, test_case_ind=index)
    if TOKEN not in task.prompt:
        raise UserError(f"{where}: the prompt {task.prompt!r} does not hold {TOKEN}; {mend}")
    return task


def chosen_tasks(settings: Settings) -> dict[int, Task]:
    """{number: task} of TASK_IDX. UserError for a number that does not exist."""
    tasks, what = read_tasks(settings.task_json), f"tasks in {settings.task_json}"
    chosen = parse_numbers("TASK_IDX", settings.task_idx, len(tasks), what)
    return {i: tasks[i] for i in chosen}


def below(root: Path, path: Any, what: str = "the path") -> Path:
    """A path of the release ("dataset/exemplar/...") under DATA_DIR, without a first "dataset".

    what: whose path it is. UserError for one that is no text or leads out of DATA_DIR.
    """
    name = path.removeprefix("dataset/") if isinstance(path, str) else path
    return safe_join(root, name, what, links=True)  # parts of 100 GB and more may lie elsewhere


def token_folder(root: Path, task: Task) -> Path:
    """Where run_ti.sh leaves the task's token. UserError for a model outside DATA_DIR."""
    return below(root, task.model_path.replace("models", "models-ti", 1), "the task's model")


def entries_of(root: Path, case: Any) -> list[dict[str, Any]]:
    """The entries of json/{case}.json. UserError when it is missing, damaged or outside."""
    path = below(root, f"json/{case}.json", "the test case")
    entries = read_json(path, fetch(root), list)
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is not a list of objects; {fetch(root)}")
    return entries


def exemplars(root: Path, task: Task) -> list[Path]:
    """The pictures that taught the task's token. UserError when the release has them not here."""
    file, index = f"{task.test_case}.json", task.test_case_ind
    entries = entries_of(root, task.test_case)
    if not 0 <= index < len(entries):
        reason = f"has {len(entries)} entries but a task names entry {index}"
        raise UserError(
            f"{file} {reason}; set TASK_JSON and DATA_DIR so that both are of one release"
        )
    listed = entries[index].get("exemplar")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file}, entry {index} lists no exemplar; {fetch(root)}")
    paths = [below(root, p, f"{file}, entry {index}: the exemplar") for p in listed]
    for path in paths:
        if not path.is_file():
            raise UserError(f"the exemplar {path} is missing; {fetch(root, 'exemplar')}")
    return paths


def make_tasks(root: Path) -> list[Task]:
    """The published list, in its order: blocks of one model of each test case; in a block first the
    gpt prompts, then the others, and the four models in turn.

    Test cases whose JSON file is absent are left out; UserError if all are.
    """
    files, mend = root / "json", fetch(root)
    named = read_json(files / "path_to_prompts.json", mend)
    prompts = {path.removeprefix("dataset/"): text for path, text in named.items()}
    lists = {case: entries_of(root, case) for case in MODELS if (files / f"{case}.json").is_file()}
    if not lists:
        raise UserError(f"{files} holds none of {', '.join(f'{c}.json' for c in MODELS)}; {mend}")
    tasks = []
    for block in zip(*(MODELS[case] for case in lists), strict=True):
        chosen = [(c, i) for c, i in zip(lists, block, strict=True) if i < len(lists[c])]
        for gpt in (True, False):
            columns = [_tasks_of(case, i, lists[case][i], prompts, gpt, mend) for case, i in chosen]
            tasks += filter(None, chain.from_iterable(zip_longest(*columns)))
    return tasks


def _tasks_of(
    case: str, index: int, entry: dict[str, Any], prompts: dict[str, str], gpt: bool, mend: str
) -> list[Task]:
    """Tasks of one model for its gpt prompts, or for its other prompts."""
    category, synth = entry.get("category") or "art", entry.get("synth")
    lists = synth.values() if isinstance(synth, dict) else [None]
    if not isinstance(category, str) or not all(isinstance(paths, list) for paths in lists):
        raise UserError(f"{case}.json, entry {index} lists no pictures by prompt; {mend}")
    is_style = category == "art"
    train_prompt = f"A picture in the style of {TOKEN} art" if is_style else f"{TOKEN} {category}"
    kind = next((k for k in synth if (k == "gpt") == gpt), None)
    tasks, where = [], f"{case}.json, entry {index}"
    for path in synth[kind][::EVERY] if kind is not None else ():
        below(Path(), path, f"{where}: the picture")  # the model's folder is named by its parts
        path = path.removeprefix("dataset/")
        if path not in prompts:
            raise UserError(f"path_to_prompts.json has no prompt for {path}; {mend}")
        parts = Path(path).parts  # synth/artchive/gpt/african/samples/00000.png
        if len(parts) < 5:
            raise UserError(f"{where}: {path} names no model; {mend}")
        folder = f"models/{parts[1]}/{parts[3]}"
        entry = {"synth_image_path": path, "prompt": prompts[path], "test_case": case}
        entry |= {"test_case_ind": index, "model_path": folder}
        tasks.append(
            _task(where, entry | {"train_prompt": train_prompt, "category": category}, mend)
        )
    return tasks


def write_tasks(root: Path, path: Path) -> int:
    """`make_tasks` as a JSON file in the published schema; returns their number."""
    tasks = make_tasks(root)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(task) for task in tasks])
    return len(tasks)
