"""kill -9 at many moments of every verb that writes: each file of a final name is the old one or
the new one, whole, and the same command again comes to the same end.
"""

import os
import re
import shutil
import signal

import kills
import numpy as np
import pytest
import standin
from conftest import save_tiny_data, save_tiny_pipeline
from hub_server import HubServer

from experiments.abc.download.parts import GEN_DATA, UNLEARNING
from experiments.abc.download.release import SETTINGS_NAME
from experiments.abc.download.release import SOURCE as RELEASE

py7zr = pytest.importorskip("py7zr")

SMALL = {
    "prompt": "a cat in the style of blob",
    "target_concepts": "cat,blob",
    **{"proj_dim": 32, "num_split": 2, "nfe": 3, "gen_num_inference_steps": 4, "epochs": 2},
    **{"batch_size": 4, "top_k": 3, "device": "cpu"},
}
PICTURES = 11  # to be encoded, of the tiny data
TASKS = {"proj_dim": 64, "num_split": 2, "epochs": 1, "gen_num_inference_steps": 10}
# says how far a shard, or a training, is: true at every moment, though not the same
PROGRESS = re.compile(r"train_grad-\d+\.json|index\.html|checkpoints/\w+\.\w+$|\.checkpoint\.")
# folders whose files go together: all old or all new
WHOLE = re.compile(
    r"(free_query|eval|model|cad)/[^/.][^/]*/|exported/|edited/|data/emoji/judge/|checkpoints/\w+/"
)


class Bench:
    """What a verb needs, made once; `work` is the folder that it changes."""

    def __init__(self, root):
        self.root, self.work = root, root / "work"
        self.pipeline, self.data = save_tiny_pipeline(root / "pipeline"), root / "data"
        save_tiny_data(self.data)
        self.work.mkdir()
        self.variables = {}  # of the verb's process

    def flags(self, **changes):
        places = {"grad_dir": self.work / "grads", "results_dir": self.work / "results"}
        model = {"sd_model_path": self.pipeline, "data_dir": self.data}
        return {**model, **places, **SMALL, **changes}

    def run(self, argv, at=0):
        return kills.run(argv, self.work, at, self.variables)

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
    made = Bench(tmp_path_factory.mktemp("kills"))
    with HubServer() as hub:
        rng = np.random.default_rng(0)
        rows = [rng.standard_normal((5, 8)).astype("<f4").tobytes() for _ in range(3)]
        hub.repos[RELEASE] = {f"{SETTINGS_NAME}/train_grad-{i}.npy": r for i, r in enumerate(rows)}
        hub.repos[GEN_DATA] = archive_of_exemplars(made.root)
        hub.repos[UNLEARNING] = {}
        made.variables = {"HF_ENDPOINT": hub.url, "no_proxy": "*", "HF_HUB_OFFLINE": ""}
        yield made


def archive_of_exemplars(folder):
    """{path on the hub: bytes}: the part "exemplar" in two volumes."""
    with py7zr.SevenZipFile(folder / "a.7z", "w", filters=[{"id": py7zr.FILTER_COPY}]) as archive:
        for name in "ab":
            content = np.random.default_rng(ord(name)).bytes(900)
            archive.writestr(content, f"exemplar/artchive/images/{name}.jpg")
    whole = (folder / "a.7z").read_bytes()
    halves = whole[:1000], whole[1000:]
    return {f"exemplar/exemplar.7z.{i:03d}": half for i, half in enumerate(halves, 1)}


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


def suspects(bench):
    return [train_grad(bench)[1]], call("suspects", bench.flags())


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


def prepare_more(bench):
    """A picture was added to what is prepared."""
    shutil.rmtree(bench.root / "more", ignore_errors=True)
    shutil.copytree(bench.data, bench.root / "more")
    argv = call(
        "prepare", bench.flags(source_dir=bench.root / "more", data_dir=bench.work / "encoded")
    )

    def add():
        lines = (bench.data / "metadata.jsonl").read_text().splitlines(keepends=True)
        text = lines[1].replace("a cat in", "the cat in")
        (bench.root / "more/metadata.jsonl").write_text("".join([*lines, text]))

    return [argv, add], argv


def train_model(bench):
    return [], ["train-model", f"--data-dir={bench.data}", "--device=cpu"]


def train_judge(bench):
    flags = {"sd_model_path": bench.pipeline, "data_dir": bench.data, "device": "cpu"}
    return [call("train-judge", flags | {"seed": 1})], call("train-judge", flags | {"seed": 2})


def judge_model(bench):
    flags = bench.flags(num_queries=1)
    kept = ("sd_model_path", "data_dir", "results_dir", "num_queries", "device")
    asked = {k: flags[k] for k in (*kept, "gen_num_inference_steps")}
    return [train_judge(bench)[1]], call("judge-model", asked)


def train_token(bench):
    flags = {"sd_model_path": bench.pipeline, "results_dir": bench.work / "results"}
    own = [f"--images={bench.data}", "--steps=4", f"--out-dir={bench.work}/tokens"]
    return [], call("train-token", flags | {"device": "cpu", "batch_size": 2}, *own)


def download_abc(bench):
    flags = {"data_dir": bench.work / "abc", "parts": "exemplar", "max_workers": 1}
    return [], call("download-abc", flags)


def download_train_grad(bench):
    numbers = {"count": 3, "rows": 5, "dim": 8, "max_workers": 1}
    return [], call("download-train-grad", {"grad_root": bench.work / "released", **numbers})


def edit(bench):
    """An erasing edit and the edited pipeline."""
    flags = bench.flags(concept="cat", ratio=0.3, score_seeds=1, selection="cross_attention")
    kept = ("sd_model_path", "data_dir", "results_dir", "concept", "ratio", "score_seeds")
    asked = {k: flags[k] for k in (*kept, "selection", "gen_num_inference_steps", "device")}
    return [], call("cad-erase", asked, f"--export={bench.work}/edited")


test_grad.__test__ = False
QUICK = (train_grad, attribute, train_judge)
VERBS = (train_grad, attribute, attribute_again, evaluate, prepare, prepare_more, export)
VERBS += (make_tasks, task_grad, test_grad, evaluate_tasks, train_model, train_judge, judge_model)
VERBS += (train_token, download_abc, download_train_grad, suspects, edit)


def part_of(content, folder):
    return {f: digest for f, digest in content.items() if folder in f}


def check(bench, verb, count, between=lambda: None, after=lambda: None):
    """Kill the verb at `count` moments, each from the same beginning. between: called before the
    verb is to be killed; after: when it was run again.
    """
    shutil.rmtree(bench.work)
    bench.work.mkdir()
    first, last = verb(bench)
    for step in first:
        code, _, told = step() or (0, 0, "") if callable(step) else bench.run(step)
        assert code == 0, told
    old, kept = kills.content(bench.work), bench.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(bench.work, kept, symlinks=True)
    code, changes, told = bench.run(last)
    new = kills.content(bench.work)
    assert code == 0 and new != old, told
    for moment in kills.moments(changes, count):
        shutil.rmtree(bench.work)
        shutil.copytree(kept, bench.work, symlinks=True)
        between()
        code, _, told = bench.run(last, moment)
        assert code == -signal.SIGKILL, told
        found = kills.content(bench.work)
        torn = [f for f in found if found[f] not in (old.get(f), new.get(f))]
        torn += [f for f in old if f in new and f not in found]
        assert not [f for f in torn if not PROGRESS.search(f)], (moment, torn)
        for folder in {match[0] for f in found if (match := WHOLE.search(f))}:
            mixed = part_of(found, folder) not in (part_of(old, folder), part_of(new, folder))
            assert not mixed, (moment, folder)
        code, _, told = bench.run(last)
        assert code == 0, (moment, told)
        assert kills.content(bench.work) == new, moment
        after()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("verb", QUICK, ids=lambda verb: verb.__name__)
def test_a_kill_at_some_moments_leaves_the_old_or_the_new(bench, verb):
    check(bench, verb, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_encoding_encodes_only_the_step_at_hand_again(bench):
    told, counts = bench.root / "encoded.txt", []

    def after():
        rows = told.read_text().split()
        assert len({*rows}) == PICTURES
        counts.append(len(rows) - PICTURES)

    check(bench, prepare, 5, lambda: told.unlink(missing_ok=True), after)
    assert len(counts) == 5 and max(counts) <= SMALL["batch_size"]
    # most kills come when some of it is on the disk, and none of that is encoded again
    assert sum(count == 0 for count in counts) >= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_of_an_export_leaves_no_part_of_a_pipeline(bench):
    shutil.rmtree(bench.work)
    bench.work.mkdir()
    _, argv = edit(bench)
    code, _, told = bench.run(argv, r"\bvae/config\.json$")
    assert code == -signal.SIGKILL, told
    assert not (bench.work / "edited").exists() and list(bench.work.glob(".edited.*.part"))
    code, _, told = bench.run(argv)
    assert code == 0, told
    made = {path.name for path in (bench.work / "edited").iterdir()}
    assert made >= {"model_index.json", "unet", "vae", "text_encoder", "export.json"}
    assert not list(bench.work.glob(".edited.*"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_a_kill_at_twenty_moments_leaves_the_old_or_the_new(bench, verb):
    check(bench, verb, int(os.environ.get("KILL_MOMENTS", 20)))
