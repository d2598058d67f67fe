"""The tasks of AbC: a prompt with a token <new1> that was learned from exemplars; which pictures
are the exemplars?

    {"synth_image_path": "synth/artchive/gpt/african/samples/00000.png", "prompt": "... in the style
    of <new1> art",
     "test_case": "test_artchive", "test_case_ind": 0, "model_path": "models/artchive/african",
     "train_prompt": "A picture in the style of <new1> art", "category": "art"}

400 tasks are published with "Data Attribution for Text-to-Image Models by Unlearning Synthesized
Images" (Wang et al. 2024); `make_tasks` builds the same list from the JSON files of the AbC
release: of 5 models a test case every fourth picture of both prompt kinds. Exemplars of a model:
json/{test_case}.json, entry `test_case_ind`, key "exemplar".
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path

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
    """The tasks of a JSON file. UserError when it is missing or an entry lacks a field or the
    token.
    """
    path, fields = Path(path), Task.__dataclass_fields__
    if not path.is_file():
        raise UserError(
            f"{path} is missing; make it with bash scripts/abc/make_tasks.sh, or give TASK_JSON"
        )
    try:
        tasks = [
            Task(**{name: entry[name] for name in fields})
            for entry in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a list of tasks ({type(error).__name__}: {error}); make it again with "
            "scripts/abc/make_tasks.sh"
        ) from None
    for number, task in enumerate(tasks):
        if TOKEN not in task.prompt:
            raise UserError(
                f"{path}, task {number}: the prompt {task.prompt!r} does not hold {TOKEN}; mend "
                "the file"
            )
    return tasks


def chosen_tasks(settings: Settings) -> dict[int, Task]:
    """{number: task} of TASK_IDX. UserError for a number that does not exist."""
    tasks = read_tasks(settings.task_json)
    return {
        i: tasks[i]
        for i in parse_numbers(
            "TASK_IDX", settings.task_idx, len(tasks), f"tasks in {settings.task_json}"
        )
    }


def below(root: Path, path: str) -> Path:
    """A path of the release ("dataset/exemplar/...") under DATA_DIR: only a first component
    "dataset" is dropped.
    """
    return root / path.removeprefix("dataset/")


def read_json(path: Path):
    """Content of one of the release's JSON files. UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; fetch it with PARTS=json bash scripts/abc/run_download.sh"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and download it again") from None


def exemplars(root: Path, task: Task) -> list[Path]:
    """The pictures that taught the task's token. UserError when the release does not have them
    here.
    """
    entries = read_json(root / "json" / f"{task.test_case}.json")
    if not 0 <= task.test_case_ind < len(entries):
        raise UserError(
            f"{task.test_case}.json has {len(entries)} entries but a task names entry "
            f"{task.test_case_ind}; both must be of one release"
        )
    paths = [below(root, p) for p in entries[task.test_case_ind]["exemplar"]]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"the exemplar {path} is missing; fetch it with PARTS=exemplar bash "
                "scripts/abc/run_download.sh"
            )
    return paths


def make_tasks(root: Path) -> list[Task]:
    """The published list, in its order: blocks of one model of each test case; in a block first the
    gpt prompts, then the others, and the four models in turn. Test cases whose JSON file is absent
    are left out; UserError if all are."""
    prompts = {
        path.removeprefix("dataset/"): text
        for path, text in read_json(root / "json" / "path_to_prompts.json").items()
    }
    cases = [case for case in MODELS if (root / "json" / f"{case}.json").is_file()]
    if not cases:
        raise UserError(
            f"{root / 'json'} holds none of {', '.join(f'{c}.json' for c in MODELS)}; fetch them "
            "with PARTS=json scripts/abc/run_download.sh"
        )
    lists = {case: read_json(root / "json" / f"{case}.json") for case in cases}
    tasks = []
    for model in range(len(MODELS[cases[0]])):
        chosen = [
            (case, MODELS[case][model]) for case in cases if MODELS[case][model] < len(lists[case])
        ]
        for gpt in (True, False):
            columns = [
                _tasks_of(case, index, lists[case][index], prompts, gpt) for case, index in chosen
            ]
            tasks += filter(None, chain.from_iterable(zip_longest(*columns)))
    return tasks


def _tasks_of(case: str, index: int, entry: dict, prompts: dict, gpt: bool) -> list[Task]:
    """Tasks of one model for its gpt prompts, or for its other prompts."""
    category = entry.get("category") or "art"
    train_prompt = (
        f"A picture in the style of {TOKEN} art" if category == "art" else f"{TOKEN} {category}"
    )
    kind = next((k for k in entry["synth"] if (k == "gpt") == gpt), None)
    tasks = []
    for path in (
        p.removeprefix("dataset/") for p in (entry["synth"][kind][::EVERY] if kind else ())
    ):
        if path not in prompts:
            raise UserError(
                f"path_to_prompts.json has no prompt for {path}; fetch the json part of the "
                "release again"
            )
        top, group, _, model = Path(path).parts[:4]  # synth/artchive/gpt/african/samples/00000.png
        tasks.append(
            Task(
                path, prompts[path], case, index, f"models/{group}/{model}", train_prompt, category
            )
        )
    return tasks


def write_tasks(root: Path, path: Path) -> int:
    """`make_tasks` as a JSON file in the published schema; returns their number."""
    tasks = make_tasks(root)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(task) for task in tasks])
    return len(tasks)
