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

import json
import re
from dataclasses import asdict, dataclass, fields
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import disk_errors, write_json
from ..parsing import parse_numbers
from ..settings import TOKEN, Settings

MODELS = {  # entries of json/{test_case}.json that the published tasks use
    "test_artchive": (0, 1, 2, 3, 4),
    "test_bamfg": (0, 1, 2, 3, 4),
    "test_unobserved_imagenet": (0, 20, 70, 180, 210),
    "test_observed_imagenet": (11, 12, 17, 18, 19),
}
EVERY = 4  # the four pictures of a prompt follow one another; the first is asked about


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
    """The tasks of a JSON file. UserError when it is missing or an entry lacks a field or TOKEN."""
    path, names = Path(path), [field.name for field in fields(Task)]
    if not path.is_file():
        remedy = "make it with bash scripts/abc/make_tasks.sh, or give TASK_JSON"
        raise UserError(f"{path} is missing; {remedy}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        tasks = [Task(**{name: entry[name] for name in names}) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"is not a list of tasks ({type(error).__name__}: {error})"
        raise UserError(f"{path} {reason}; make it again with scripts/abc/make_tasks.sh") from None
    for number, task in enumerate(tasks):
        if TOKEN not in task.prompt:
            reason = f"the prompt {task.prompt!r} does not hold {TOKEN}"
            raise UserError(f"{path}, task {number}: {reason}; mend the file")
    return tasks


def chosen_tasks(settings: Settings) -> dict[int, Task]:
    """{number: task} of TASK_IDX. UserError for a number that does not exist."""
    tasks, what = read_tasks(settings.task_json), f"tasks in {settings.task_json}"
    chosen = parse_numbers("TASK_IDX", settings.task_idx, len(tasks), what)
    return {i: tasks[i] for i in chosen}


def below(root: Path, path: str) -> Path:
    """A path of the release ("dataset/exemplar/...") under DATA_DIR, without a first "dataset"."""
    return root / path.removeprefix("dataset/")


def read_json(path: Path) -> Any:
    """Content of one of the release's JSON files. UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "fetch it with PARTS=json bash scripts/abc/run_download.sh"
        raise UserError(f"{path} is missing; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and download it again") from None


def exemplars(root: Path, task: Task) -> list[Path]:
    """The pictures that taught the task's token. UserError when the release has them not here."""
    file, index = f"{task.test_case}.json", task.test_case_ind
    entries = read_json(root / "json" / file)
    if not 0 <= index < len(entries):
        reason = f"has {len(entries)} entries but a task names entry {index}"
        raise UserError(f"{file} {reason}; both must be of one release")
    paths = [below(root, p) for p in entries[index]["exemplar"]]
    for path in paths:
        if not path.is_file():
            remedy = "fetch it with PARTS=exemplar bash scripts/abc/run_download.sh"
            raise UserError(f"the exemplar {path} is missing; {remedy}")
    return paths


def make_tasks(root: Path) -> list[Task]:
    """The published list, in its order: blocks of one model of each test case; in a block first the
    gpt prompts, then the others, and the four models in turn.

    Test cases whose JSON file is absent are left out; UserError if all are.
    """
    files, named = root / "json", read_json(root / "json" / "path_to_prompts.json")
    prompts = {path.removeprefix("dataset/"): text for path, text in named.items()}
    lists = {c: read_json(files / f"{c}.json") for c in MODELS if (files / f"{c}.json").is_file()}
    if not lists:
        remedy = "fetch them with PARTS=json scripts/abc/run_download.sh"
        raise UserError(f"{files} holds none of {', '.join(f'{c}.json' for c in MODELS)}; {remedy}")
    tasks = []
    for block in zip(*(MODELS[case] for case in lists), strict=True):
        chosen = [(c, i) for c, i in zip(lists, block, strict=True) if i < len(lists[c])]
        for gpt in (True, False):
            columns = [_tasks_of(case, i, lists[case][i], prompts, gpt) for case, i in chosen]
            tasks += filter(None, chain.from_iterable(zip_longest(*columns)))
    return tasks


def _tasks_of(
    case: str, index: int, entry: dict[str, Any], prompts: dict[str, str], gpt: bool
) -> list[Task]:
    """Tasks of one model for its gpt prompts, or for its other prompts."""
    category = entry.get("category") or "art"
    is_style = category == "art"
    train_prompt = f"A picture in the style of {TOKEN} art" if is_style else f"{TOKEN} {category}"
    kind = next((k for k in entry["synth"] if (k == "gpt") == gpt), None)
    tasks = []
    for path in entry["synth"][kind][::EVERY] if kind else ():
        path = path.removeprefix("dataset/")
        if path not in prompts:
            remedy = "fetch the json part of the release again"
            raise UserError(f"path_to_prompts.json has no prompt for {path}; {remedy}")
        top, group, _, model = Path(path).parts[:4]  # synth/artchive/gpt/african/samples/00000.png
        folder = f"models/{group}/{model}"
        tasks.append(Task(path, prompts[path], case, index, folder, train_prompt, category))
    return tasks


def write_tasks(root: Path, path: Path) -> int:
    """`make_tasks` as a JSON file in the published schema; returns their number."""
    tasks = make_tasks(root)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(task) for task in tasks])
    return len(tasks)
