"""Every AbC script, end to end through bash, on the stand-ins: a researcher's session in the order
in which it is typed.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import served
import standin

from concept_trak.attribution import multi_gpu
from concept_trak.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
ROWS = 12
SMALL = {
    "NUM_TRAIN": ROWS,
    "PROJ_DIM": "256",
    "NUM_SPLIT": "2",
    "EPOCHS": "2",
    "GEN_NUM_INFERENCE_STEPS": "10",
    "BATCH_SIZE": "20",
    "TOP_K": "3",
}


class Session:
    """A shell with the variables of one user: `run` calls a script and gives (exit code, output
    lines, what matters last).
    """

    def __init__(self, root):
        self.root, self.grads, self.results = root, root / "grads", root / "results/qual"
        self.data = standin.save_release(root / "abc")
        self.env = {
            "SD_MODEL_PATH": standin.save_sd_standin(root / "pipeline"),
            "DATA_DIR": self.data,
            "GRAD_DIR": self.grads,
            "RESULTS_DIR": self.results,
            "TASK_JSON": root / "configs/all_tasks.json",
            "DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            **SMALL,
        }

    def run(self, script, *arguments, **variables):
        line = shlex.join(["bash", str(ROOT / "scripts/abc" / script), *map(str, arguments)])
        done = served.run(line, self.root, ROOT, **self.env | variables)
        told = [done.stderr, done.stdout]
        return done.returncode, "".join(told[::-1] if done.returncode else told).splitlines()

    @property
    def store(self):
        return self.grads / "attn2-dps-NFE10-norm-ddim-gs_7.5-random_mask_256"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The launcher looks at the model in this process; test_launch.py has it as it is."""

    def here(settings, gpu):
        return multi_gpu._create(settings.on(gpu))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_gpu, "create_store_in_subprocess", here)
        yield Session(tmp_path_factory.mktemp("session"))


DYING = """
import os, pathlib, signal, sys
from concept_trak.store.store import Store
from concept_trak.store.writer import ShardWriter

writer = ShardWriter(Store.read_manifest(pathlib.Path(sys.argv[1])), 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(session):
    """(exit code, lines) of the train gradients by two processes at once, of which that of shard 1
    dies by SIGKILL when it has begun its shard.
    """
    command = multi_gpu.command

    def dying(settings, shard, gpu):
        line = command(settings, shard, gpu)
        own = [sys.executable, "-c", DYING, str(session.store)]
        return [*line[: line.index("--no_python") + 1], *own] if shard == 1 else line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_gpu, "command", dying)
        return session.run("run_train_grad.sh", GPU_IDS="cpu cpu")


@pytest.fixture(scope="module")
def trained(session, killed):
    """The train gradients, the killed shard having run again alone."""
    code, lines = session.run("run_train_grad.sh", SHARDS="1")
    assert code == 0, lines
    return session


@pytest.fixture(scope="module")
def tasks_made(session):
    code, lines = session.run("make_tasks.sh")
    assert code == 0 and lines[-1].endswith("4 tasks")
    return session


def test_a_shard_that_dies_is_told_and_runs_again_alone(session, killed):
    code, lines = killed
    output = "\n".join(lines)
    assert code == 2 and "shard 1 died on cpu" in output and "run again with SHARDS=1" in output
    assert "Traceback" not in output
    assert (session.store / "train_grad-1.npy.part").exists()
    assert Store.read_manifest(session.store).pending() == [1]  # the other one went on to its end


def test_two_processes_fill_the_store_of_the_references_name(trained):
    store = Store.open(trained.store)
    assert (store.num_rows, store.dim, store.num_split, store.dtype) == (ROWS, 256, 2, "float32")
    assert not store.pending() and store.identity["projection"]["kind"] == "random_mask"
    assert (trained.store / "logs/train_grad-0.log").exists()


def test_finished_shards_are_skipped_and_nothing_is_overwritten(trained):
    before = {p.name: p.stat().st_mtime_ns for p in trained.store.glob("train_grad-*.npy")}
    code, lines = trained.run("run_train_grad_norm_4gpu.sh", GPU_IDS="cpu")
    assert code == 0 and any("0 of 2 shards to compute" in line for line in lines)
    assert before == {p.name: p.stat().st_mtime_ns for p in trained.store.glob("train_grad-*.npy")}


def test_free_query_writes_a_report_and_the_references_files(trained):
    code, lines = trained.run(
        "run_qual_free.sh", PROMPT="a cat in the style of sun", TARGET_CONCEPTS="cat,sun", SEED="3"
    )
    assert code == 0, lines
    (report,) = trained.results.glob("free_query/a-cat*/report.html")
    target = report.parent / "target_cat"
    assert {
        "query.png",
        "concept_grad.npy",
        "metrics.json",
        "topk-lambda_1.0e-04.jpg",
        "topk-prompts-lambda_1.0e+04.txt",
    } <= {p.name for p in target.iterdir()}
    assert np.load(target / "concept_grad.npy").shape == (1, 256)


def test_a_custom_prompt_does_not_keep_another_prompts_negatives(trained):
    (target,) = trained.results.glob("free_query/a-cat*/target_cat")
    assert json.loads((target / "query_meta.json").read_text())["negative"] == "in the style of sun"


def test_task_rows_have_the_references_names(trained, tasks_made):
    assert trained.run("run_task_grad.sh", TASK_IDX="0-1")[0] == 0
    code, lines = trained.run("run_test_grad.sh", TASK_IDX="0")
    assert code == 0, lines
    assert np.load(trained.store / "task_grad-0.npy").shape == (3, 256) and np.load(
        trained.store / "task_grad-1.npy"
    ).shape == (2, 256)
    assert np.load(
        trained.grads / "attn2-test_grad-NFE10-gs_1.0-eta_0.1-norm/test_grad-0.npy"
    ).shape == (1, 256)


def test_evaluation_ends_with_one_json_line_and_keeps_a_folder_a_task(trained, tasks_made):
    code, lines = trained.run("run_eval.sh", TASK_IDX="0-1")
    assert code == 0, lines
    figures = json.loads(lines[-1])
    assert figures["tasks"] == 2 and figures["num_train"] == ROWS and figures["damping"] == 10.0
    assert {
        "recall_at_10",
        "recall_at_10_of_exemplars",
        "reverse_recall_at_10",
        "map",
        "ci95",
        "oracle",
    } <= figures.keys()
    listing = (
        (trained.root / "results/qual/eval/latest/task_0/topk-prompts-lambda_1.0e+02.txt")
        .read_text()
        .splitlines()
    )
    assert (
        listing[0].split("\t") == ["rank", "train|exemplar", "idx", "caption", "score"]
        and len(listing) == 4
    )


def test_another_model_is_refused_not_scored(trained, tmp_path):
    other = standin.save_sd_standin(tmp_path / "other", seed=1)
    code, lines = trained.run(
        "run_qual_free.sh", PROMPT="a cat", TARGET_CONCEPTS="cat", SD_MODEL_PATH=other
    )
    assert (
        code == 2
        and "was made with model" in lines[-1]
        and not any("Traceback" in line for line in lines)
    )


def test_own_pictures_go_from_a_folder_to_a_report_in_one_command(session, tmp_path):
    mine = tmp_path / "mine"
    rng = np.random.default_rng(1)
    for i in range(8):
        standin.picture(rng, mine / f"{i}.jpg")
    (mine / "captions.txt").write_text(
        "".join(f"a {w} {i}\n" for i, w in enumerate("cat dog tree sun cat dog tree sun".split()))
    )
    variables = {
        "DATA_DIR": tmp_path / "arrays",
        "GRAD_DIR": tmp_path / "grads",
        "RESULTS_DIR": tmp_path / "qual",
        "PROMPT": "a cat",
        "TARGET_CONCEPTS": "cat",
    }
    code, lines = session.run("run_own_data.sh", mine, **variables)
    assert code == 0, lines
    assert np.load(tmp_path / "arrays/laion_latents.npy").shape == (16, *standin.LATENT)
    assert list((tmp_path / "qual/free_query").glob("[!l]*/report.html"))
    stamp = (tmp_path / "arrays/laion_latents.npy").stat().st_mtime_ns
    assert session.run("run_prepare.sh", SOURCE_DIR=mine, DATA_DIR=tmp_path / "arrays")[0] == 0
    assert (tmp_path / "arrays/laion_latents.npy").stat().st_mtime_ns == stamp


def test_two_folders_of_one_name_share_neither_arrays_nor_gradients(tmp_path):
    """A stand-in for Python tells the folders that the script gives it."""
    python, told = tmp_path / "python", []
    python.write_text('#!/bin/bash\necho "$DATA_DIR $GRAD_DIR"\n')
    python.chmod(0o755)
    own = {k: v for k, v in os.environ.items() if k not in ("DATA_DIR", "GRAD_DIR")}
    own |= {"PROMPT": "a cat", "TARGET_CONCEPTS": "cat"}
    for above in ("one", "other"):
        (tmp_path / above / "mine").mkdir(parents=True)
        done = subprocess.run(
            ["bash", ROOT / "scripts/abc/run_own_data.sh", tmp_path / above / "mine"],
            env={**own, "PYTHON_BIN": str(python)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(set(done.stdout.split()))
    assert len(told[0]) == len(told[1]) == 2 and not told[0] & told[1]


@pytest.mark.parametrize(
    "script, variables, word",
    [
        ("run_eval.sh", {"TASK_IDX": "99"}, "TASK_IDX='99' names 99"),
        ("run_qual_free.sh", {"PROMPT": ""}, "PROMPT is empty"),
        ("run_train_grad.sh", {"GPU_IDS": "cpu x"}, "GPU_IDS"),
        ("run_prepare.sh", {}, "SOURCE_DIR is not set"),
    ],
)
def test_a_mistake_is_one_line(trained, tasks_made, script, variables, word):
    code, lines = trained.run(script, **variables)
    assert code != 0 and word in lines[-1] and not any("Traceback" in line for line in lines)
