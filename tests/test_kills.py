"""kill -9 at many moments of every verb that writes: each file of a final name is the old one or
the new one, whole, and the same command again comes to the same end.
"""

import os
import re
import shutil
import signal

import kills
import pytest
import standin
from conftest import save_tiny_data, save_tiny_pipeline

SMALL = {
    "prompt": "a cat in the style of blob",
    "target_concepts": "cat,blob",
    **{"proj_dim": 32, "num_split": 2, "nfe": 3, "gen_num_inference_steps": 4, "epochs": 2},
    **{"batch_size": 4, "top_k": 3, "device": "cpu"},
}
TASKS = {"proj_dim": 64, "num_split": 2, "epochs": 1, "gen_num_inference_steps": 10}
# says how far a shard is: true at every moment, though not the same
PROGRESS = re.compile(r"train_grad-\d+\.json|index\.html")


class Bench:
    """What a verb needs, made once; `work` is the folder that it changes."""

    def __init__(self, root):
        self.root, self.work = root, root / "work"
        self.pipeline, self.data = save_tiny_pipeline(root / "pipeline"), root / "data"
        save_tiny_data(self.data)
        self.work.mkdir()

    def flags(self, **changes):
        places = {"grad_dir": self.work / "grads", "results_dir": self.work / "results"}
        model = {"sd_model_path": self.pipeline, "data_dir": self.data}
        return {**model, **places, **SMALL, **changes}

    def abc(self):
        if not (self.root / "abc").exists():
            standin.save_sd_standin(self.root / "sd")
            standin.save_release(self.root / "abc")
        places = {"grad_dir": self.work / "grads", "results_dir": self.work / "results"}
        tasks = {"task_json": self.work / "tasks.json", "task_idx": "0-1"}
        model = {"sd_model_path": self.root / "sd", "data_dir": self.root / "abc"}
        return {**model, **places, **tasks, **TASKS, "batch_size": 20, "top_k": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("kills"))


def call(verb, flags, *more):
    return [verb, *more, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]


def train_grad(bench):
    return [], call("train-grad", bench.flags())


def attribute(bench):
    return [train_grad(bench)[1]], call("attribute", bench.flags())


def attribute_again(bench):
    first = [train_grad(bench)[1], attribute(bench)[1]]
    return first, call("attribute", bench.flags(render_leastk=1))


def evaluate(bench):
    methods = {"methods": "concept_trak,caption_similarity", "num_queries": 2}
    return [train_grad(bench)[1]], call("evaluate", bench.flags(**methods))


def prepare(bench):
    return [], call("prepare", bench.flags(source_dir=bench.data, data_dir=bench.work / "encoded"))


def export(bench):
    out = f"--out-dir={bench.work}/exported"
    return [train_grad(bench)[1]], call("export", bench.flags(), out, "--kind=dattri")


def make_tasks(bench):
    return [], call(
        "make-tasks", {k: bench.abc()[k] for k in ("data_dir", "task_json")}, "--benchmark=abc"
    )


def task_grad(bench):
    return [make_tasks(bench)[1]], call("task-grad", bench.abc(), "--benchmark=abc")


def test_grad(bench):
    return [make_tasks(bench)[1]], call("test-grad", bench.abc(), "--benchmark=abc")


def evaluate_tasks(bench):
    train = call("train-grad", bench.abc(), "--benchmark=abc")
    return [make_tasks(bench)[1], train], call("evaluate-tasks", bench.abc(), "--benchmark=abc")


test_grad.__test__ = False
QUICK = (train_grad, attribute, prepare)
VERBS = (train_grad, attribute, attribute_again, evaluate, prepare, export, make_tasks)
VERBS += (task_grad, test_grad, evaluate_tasks)


def check(bench, verb, count):
    """Kill the verb at `count` moments, each from the same beginning."""
    shutil.rmtree(bench.work)
    bench.work.mkdir()
    first, last = verb(bench)
    for step in first:
        code, _, told = kills.run(step, bench.work)
        assert code == 0, told
    old, kept = kills.content(bench.work), bench.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(bench.work, kept, symlinks=True)
    code, changes, told = kills.run(last, bench.work)
    new = kills.content(bench.work)
    assert code == 0 and new != old, told
    for moment in kills.moments(changes, count):
        shutil.rmtree(bench.work)
        shutil.copytree(kept, bench.work, symlinks=True)
        code, _, told = kills.run(last, bench.work, moment)
        assert code == -signal.SIGKILL, told
        found = kills.content(bench.work)
        torn = [f for f in found if found[f] not in (old.get(f), new.get(f))]
        torn += [f for f in old if f in new and f not in found]
        assert not [f for f in torn if not PROGRESS.search(f)], (moment, torn)
        code, _, told = kills.run(last, bench.work)
        assert code == 0, (moment, told)
        assert kills.content(bench.work) == new, moment


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("verb", QUICK, ids=lambda verb: verb.__name__)
def test_a_kill_at_some_moments_leaves_the_old_or_the_new(bench, verb):
    check(bench, verb, 3)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_a_kill_at_twenty_moments_leaves_the_old_or_the_new(bench, verb):
    check(bench, verb, 20)
