"""The command line: one line for a user's mistake, whole results, cached gradients, resumed stores;
all on a tiny pipeline.
"""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from urllib.parse import unquote

import kills
import numpy as np
import pytest
import torch
from conftest import save_tiny_data, small_run
from PIL import Image

from concept_trak import cli, isolated
from concept_trak import verbs as of_library
from concept_trak.flags import FROM_ENV, settings_of
from concept_trak.parsing import parse_shards
from concept_trak.settings import ROOT, SECTIONS, Settings, names, resolve
from concept_trak.store.store import Store
from concept_trak.verbs import run_export
from experiments import cli as of_experiments

VERBS = of_library.VERBS | of_experiments.VERBS


ASKED = {"prompt": "a cat in the style of blob", "target_concepts": "cat,blob"}


@pytest.fixture
def flags(tiny_pipeline, tiny_data, tmp_path):
    """{name: value} of a run that takes a second."""
    return small_run(tiny_pipeline, tiny_data, tmp_path) | ASKED


def line_of(verb, flags):
    return [verb, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]


def run(verb, flags, **changes):
    return cli.main(line_of(verb, {**flags, **changes}))


def as_given(flags):
    """The same values as `resolve` takes them: a path is a text."""
    return {name: str(v) if isinstance(v, os.PathLike) else v for name, v in flags.items()}


def store_folder(flags):
    return next(flags["grad_dir"].glob("*/manifest.json")).parent


def target_folder(flags, target="cat"):
    """Of the newest answer."""
    found = flags["results_dir"].glob(f"free_query/[!.l]*/target_{target}")
    return max(found, key=lambda folder: (folder / "metrics.json").stat().st_mtime_ns)


@pytest.fixture(scope="module")
def made(tiny_pipeline, tiny_data, tmp_path_factory):
    """Flags whose train gradients and answer exist; to be read, or copied."""
    flags = small_run(tiny_pipeline, tiny_data, tmp_path_factory.mktemp("made")) | ASKED
    assert run("train-grad", flags) == run("attribute", flags) == 0
    return flags


@pytest.fixture
def computed(flags, made):
    """Flags whose train gradients exist."""
    shutil.copytree(made["grad_dir"], flags["grad_dir"])
    return flags


@pytest.fixture
def answered(computed, made):
    """Flags whose answer exists, too."""
    shutil.copytree(made["results_dir"], computed["results_dir"], symlinks=True)
    return computed


def refused(capfd, verb, flags, **changes):
    """The message of a run that must fail as a user's mistake does."""
    capfd.readouterr()
    assert run(verb, flags, **changes) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "verb,changes,words",
    [
        ("train-grad", {"data_dir": "/no/such/folder"}, "/no/such/folder"),
        ("train-grad", {"sd_model_path": "/no/such/model"}, "SD_MODEL_PATH"),
        ("train-grad", {"layer": "no_such_layer"}, "attn2"),
        ("train-grad", {"layer": "time_embedding.linear_1.nonsense"}, "LAYER"),
        ("train-grad", {"shards": "3"}, "SHARDS"),
        ("train-grad", {"shards": "2-9"}, "0 to 2"),
        ("train-grad", {"shards": "2-1"}, "SHARDS"),
        ("train-grad", {"shards": "one"}, "SHARDS"),
        ("train-grad", {"num_split": 99}, "NUM_SPLIT"),
        ("train-grad", {"proj_dim": 10**9, "proj_type": "random_mask"}, "random_mask"),
        ("train-grad", {"proj_type": "nonsense"}, "nonsense"),
        ("train-grad", {"f": "nonsense"}, "presence"),
        ("train-grad", {"nfe": "many"}, "--nfe"),
        ("train-grad", {"nfe": 1}, "NFE"),
        ("train-grad", {"normalize": "perhaps"}, "--normalize"),
        ("train-grad", {"num_states": 9}, "--num-states"),
        ("train-grad", {"recipe": "nonsense"}, "RECIPE"),
        ("train-grad", {"benchmark": "nonsense"}, "--benchmark"),
        ("train-grad", {"device": "nonsense"}, "DEVICE"),
        ("train-grad", {"nfe": 51, "recipe": "reference"}, "NFE"),
        ("nonsense", {}, "nonsense"),
        ("attribute", {"prompt": ""}, "PROMPT is empty"),
        ("attribute", {"target_concepts": "zebra"}, "zebra"),
        ("attribute", {"target_concepts": "cat,"}, "empty concept"),
        ("attribute", {"prompt": "a cat in the style of blub", "target_concepts": "cat"}, "'blub'"),
        ("attribute", {"prompt": "a cot in the style of blob", "target_concepts": "cot"}, "'cat'"),
        ("attribute", {"negative_prompts": "a|b|c"}, "3 items for 2 targets"),
        ("attribute", {}, "run_train_grad.sh"),
        ("attribute", {"damping": 0.5}, "DAMPING"),
    ],
)
def test_a_users_mistake_gives_one_line_and_exit_code_2(verb, changes, words, flags, capfd):
    assert words in refused(capfd, verb, flags, **changes)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"target_concepts": "blb"}, "did you mean TARGET_CONCEPTS=blob?"),
        ({"prompt": "a zebra in the style of blob", "target_concepts": "zebra"}, "cat, dog, tree"),
        ({"prompt": "a cat in the style of rococo", "target_concepts": "cat"}, "line, flat, soft"),
        ({"data_dir": "/no/such/folder"}, "/no/such/folder"),
        ({"sd_model_path": "/no/such/model"}, "/no/such/model"),
        ({}, "/scripts/emoji/run_train_grad.sh"),
    ],
)
def test_words_and_files_are_refused_before_torch_is_loaded(changes, words, flags, start):
    asked = as_given(flags | changes)
    done = start("attribute", *(f"--{k.replace('_', '-')}={v}" for k, v in asked.items()))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert words.removeprefix("/") in done.stderr and not done.stdout


def test_a_refusal_ends_in_the_command_that_mends_it(flags, capfd):
    """It is run as it stands, in a shell, and the question has its answer then."""
    line = refused(capfd, "attribute", flags)
    *variables, bash, script = shlex.split(line.split(": ")[-1])
    assert bash == "bash" and os.path.samefile(script, ROOT / "scripts/emoji/run_train_grad.sh")
    given = dict(word.split("=", 1) for word in variables)
    assert given["NUM_SPLIT"] == "3" if "NUM_SPLIT" in given else given["PROJ_DIM"] == "32"
    assert run("train-grad", {k.lower(): v for k, v in given.items()}) == 0
    assert run("attribute", flags) == 0


def test_the_picture_is_drawn_once_and_a_damaged_one_again(answered, capfd):
    computed = answered
    (path,) = computed["results_dir"].glob("free_query/.rows/picture-*.npy")
    good, when = path.read_bytes(), path.stat().st_mtime_ns
    assert run("attribute", computed, damping=0.1) == 0 and path.stat().st_mtime_ns == when
    path.write_bytes(good[:-4] + b"\0\0\0\0")
    assert run("attribute", computed) == 0 and path.read_bytes() == good
    assert run("attribute", computed, seed=1, negative_prompt="a dog") == 0
    assert len([*path.parent.glob("picture-*.npy")]) == 2


@pytest.mark.parametrize(
    "variable,near",
    [
        ("TARGET_CONCEPT", "TARGET_CONCEPTS"),
        ("TOPK", "TOP_K"),
        ("TARGET_CONCPETS", "TARGET_CONCEPTS"),
    ]
    + [("DAMPNG", "DAMPING"), ("EPOCH", "EPOCHS"), ("PROMPTS", "PROMPT")],
)
def test_a_misspelt_variable_is_noticed_when_a_script_runs(variable, near, monkeypatch, capfd):
    monkeypatch.setenv(variable, "x")
    monkeypatch.setenv(FROM_ENV, "1")
    line = refused(capfd, "concepts", {})
    assert variable in line and f"did you mean {near}?" in line
    monkeypatch.delenv(FROM_ENV)  # without a script variables mean nothing
    assert run("concepts", {}) == 0


@pytest.mark.parametrize("variable", ["PROMPT_COMMAND", "PS1", "LAYER_CACHE", "HOST", "DEVICES_X"])
def test_other_variables_are_no_misspellings(variable, monkeypatch):
    monkeypatch.setenv(variable, "x")
    monkeypatch.setenv(FROM_ENV, "1")
    assert run("concepts", {}) == 0


def test_concepts_lists_labels_by_kind_and_else_the_words_of_captions(tiny_data, tmp_path, start):
    done = start("concepts", f"--data-dir={tiny_data}")
    told = done.stdout
    assert "object: 3, each in 3 to 4 of 11 pictures\n  cat, dog, tree" in told.replace(
        "dog, tree, cat", "cat, dog, tree"
    )
    assert "style: 4, each in 2 to 3" in told and "TARGET_CONCEPTS=" in told
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "captions.txt").write_text("a corgi in a park\n")
    assert "corgi (1), park (1)" in start("concepts", f"--data-dir={tmp_path}").stdout


def test_an_unlabelled_word_that_nothing_knows_is_warned_of(flags, tmp_path, capfd):
    own = {"data_dir": tmp_path / "own", "prompt": "a zorblax, a cat"}
    save_tiny_data(own["data_dir"])
    for path in own["data_dir"].glob("metadata.jsonl"):
        captions = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{k: row[k] for k in ("file_name", "text")} for row in captions]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own["target_concepts"] = "zorblax"
    assert run("train-grad", flags, **own) == run("attribute", flags, **own) == 0
    assert "no caption holds 'zorblax', and the model hardly knows" in capfd.readouterr().err
    assert run("attribute", flags, **own | {"target_concepts": "cat"}) == 0
    (doubts,) = capfd.readouterr().err.splitlines()  # of a model that has learned nothing
    assert doubts.startswith("warning: in the eyes of the model")


def test_version_quiet_and_verbose(computed, capfd):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capfd.readouterr().out.startswith("concept-trak ")
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in computed.items()]
    said = {}
    for flag in ("-q", "-v", ""):
        assert cli.main(["attribute", *arguments, *([flag] if flag else [])]) == 0
        said[flag] = capfd.readouterr()
    assert said["-q"].out.startswith("report: ") and len(said["-q"].out.splitlines()) == 1
    assert said[""].out.startswith("loading the model ") and " s  loading the" in said["-v"].out
    (doubts,) = {told.err for told in said.values()}  # of a model that has learned nothing
    assert doubts.startswith("warning: in the eyes of the model") and doubts.count("\n") == 1
    assert cli.main(["attribute", "-v", "--damping=0.5"]) == 2
    assert "Traceback" in capfd.readouterr().err


TYPOS = {
    "max_memory": "much",
    "shards": "one",
    "task_idx": "3-1",
    "gpu_ids": "0,one",
    "methods": "tracin",
    "proj_type": "gauss",
    "query_form": "slide",
    "f": "nonsense",
    "nfe": "1",
}
# forks for each line that it reads, so that what one loads is no other's
WITHOUT_TORCH = """
import json, os, sys
from concept_trak import cli

for line in sys.stdin:
    arguments, heavy, folder = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    status = cli.main(arguments)
    heavy = {"torch", "diffusers", "transformers", *heavy} & set(sys.modules)
    assert not heavy, heavy
    raise SystemExit(status)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Runs a command line in a process of its own, which fails if it imports torch or `heavy`."""
    folder, pipe = tmp_path_factory.mktemp("start"), subprocess.PIPE
    command = [sys.executable, "-c", WITHOUT_TORCH]
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as light:

        def ask(*arguments, heavy=()):
            print(json.dumps([arguments, heavy, str(folder)]), file=light.stdin, flush=True)
            status = int(light.stdout.readline())
            out, err = ((folder / name).read_text() for name in ("out", "err"))
            return subprocess.CompletedProcess(arguments, status, out, err)

        yield ask
        light.stdin.close()


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_is_refused_before_torch_is_loaded(name, start):
    done = start("attribute", f"--{name.replace('_', '-')}={TYPOS[name]}")
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert (
        line.startswith("error: ") and name.upper() in line and TYPOS[name].split(",")[-1] in line
    )


@pytest.mark.parametrize("arguments", [[], ["attribute"], ["bench"], ["train-token"], ["export"]])
def test_help_is_there_without_loading_anything_heavy(arguments, start):
    done = start(*arguments, "--help", heavy=["numpy", "PIL", "tqdm", "huggingface_hub", "scipy"])
    assert done.returncode == 0 and done.stdout.startswith("usage: concept-trak"), done.stderr


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there is a GPU 7")
@pytest.mark.parametrize("changes", [{"device": "cuda:7"}, {"device": "", "gpu_id": 7}])
def test_a_gpu_that_is_not_there_is_refused(changes, flags, capfd):
    assert "cuda:7" in refused(capfd, "train-grad", flags, **changes)


def test_a_store_of_another_model_is_refused_and_lives_beside_its_own(
    computed, other_pipeline, capfd
):
    assert "model" in refused(capfd, "attribute", computed, sd_model_path=other_pipeline)
    assert run("train-grad", computed, sd_model_path=other_pipeline) == 0
    for model in (computed["sd_model_path"], other_pipeline):
        assert run("attribute", computed, sd_model_path=model) == 0
    assert len([*computed["grad_dir"].glob("*/manifest.json")]) == 2


@pytest.mark.parametrize("f", ["contrast", "contrast_llr", "das"])
def test_a_picture_added_costs_one_row_and_changes_no_other(f, flags, tmp_path, capfd):
    flags |= {"data_dir": save_tiny_data(tmp_path / "own"), "f": f}
    assert run("train-grad", flags) == 0
    before = Store.open(store_folder(flags))
    metadata = flags["data_dir"] / "metadata.jsonl"
    lines = metadata.read_text().splitlines(keepends=True)
    added = json.loads(lines[0]) | {"file_name": "new.png", "text": "a new dog", "split": "train"}
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(flags["data_dir"] / "new.png")
    metadata.write_text("".join([*lines[:5], json.dumps(added) + "\n", *lines[5:]]))
    capfd.readouterr()
    assert run("train-grad", flags) == 0
    assert "1 of 12 rows to compute" in (told := capfd.readouterr().out), told
    assert "11 known from before" in told
    whole = {**flags, "grad_dir": tmp_path / "whole"}
    assert run("train-grad", whole) == 0
    (folder,) = {p.parent for p in flags["grad_dir"].glob("*/manifest.json")} - {before.folder}
    found, wanted = Store.open(folder), Store.open(store_folder(whole))
    assert found.has_losses == (f != "contrast")
    np.testing.assert_allclose(found.rows(range(12)), wanted.rows(range(12)), atol=2e-3)
    place = [i for i in range(12) if not (before.rows(range(11)) == found.rows([i])).all(1).any()]
    assert len(place) == 1
    if found.has_losses:
        np.testing.assert_allclose(found.losses(), wanted.losses(), rtol=1e-4)
    assert run("attribute", flags) == 0


def test_another_model_judges_the_fit_and_changes_nothing_else(
    flags, made, other_pipeline, tmp_path
):
    """The judge's own numbers beside the attributed model's rows; itself as judge is the same."""
    stores = {"own": Store.open(store_folder(made))}
    other = shutil.copytree(other_pipeline, tmp_path / "other model")
    shutil.rmtree(other / "vae")
    shutil.copytree(flags["sd_model_path"] / "vae", other / "vae")
    for name, path in (("itself", flags["sd_model_path"]), ("other", other)):
        given = {**flags, "grad_dir": tmp_path / name, "fit_model_path": path}
        assert run("train-grad", given) == 0
        stores[name] = Store.open(store_folder(given))
    judge = {**flags, "grad_dir": tmp_path / "judge", "sd_model_path": other}
    assert run("train-grad", judge) == 0
    wanted, rows = Store.open(store_folder(judge)), range(11)
    for name in ("itself", "other"):
        np.testing.assert_array_equal(stores[name].rows(rows), stores["own"].rows(rows))
    np.testing.assert_array_equal(stores["itself"].losses(), stores["own"].losses())
    np.testing.assert_array_equal(stores["other"].losses(), wanted.losses())
    assert not np.allclose(stores["other"].losses(), stores["own"].losses())
    assert not np.array_equal(stores["other"].rows(rows), wanted.rows(rows))


def test_a_judge_of_other_latents_is_refused(flags, other_pipeline, tmp_path, capfd):
    line = refused(capfd, "train-grad", flags, fit_model_path=other_pipeline)
    assert "FIT_MODEL_PATH" in line and "another autoencoder or noise schedule" in line
    missing = refused(capfd, "train-grad", flags, fit_model_path=tmp_path / "none")
    assert str(tmp_path / "none") in missing


def test_a_missing_verb_is_refused(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "text,want", [("", [0, 1, 2, 3]), ("2", [2]), ("0,2-3", [0, 2, 3]), (" 1 , 2 ", [1, 2])]
)
def test_shards_are_numbers_and_ranges(text, want):
    assert parse_shards(text, 4) == want


def test_shards_computed_apart_make_the_store_computed_at_once(flags, made):
    assert run("train-grad", flags, shards="2") == 0 and run("train-grad", flags, shards="0-1") == 0
    apart, whole = Store.open(store_folder(flags)), Store.open(store_folder(made))
    assert apart.num_rows == 11
    np.testing.assert_array_equal(apart.rows(range(11)), whole.rows(range(11)))


def test_main_job_writes_every_named_file_and_a_self_contained_report(made):
    computed = made
    for target in ("cat", "blob"):
        folder = target_folder(computed, target)
        names = {p.name for p in folder.iterdir()}
        assert {
            "query.png",
            "query_noise.safetensors",
            "query_xT.safetensors",
            "query_meta.json",
            "concept_grad.npy",
            "metrics.json",
        } <= names
        assert len([n for n in names if n.startswith("topk-lambda_") and n.endswith(".jpg")]) == 9
        assert (
            len([n for n in names if n.startswith("topk-prompts-lambda_") and n.endswith(".txt")])
            == 9
        )
        assert not [n for n in names if "part" in n or n.endswith((".pt", ".pkl"))]
        assert np.load(folder / "concept_grad.npy", allow_pickle=False).shape == (1, 32)
        meta = json.loads((folder / "query_meta.json").read_text())
        assert (
            meta["target"] == target
            and meta["settings"]["nfe"] == 3
            and meta["provenance"]["versions"]["torch"]
        )
    reports = list(computed["results_dir"].rglob("report.html"))
    page = reports[0].read_text()
    assert reports[0].parent == computed["results_dir"] / "free_query" / os.readlink(
        computed["results_dir"] / "free_query/latest"
    )
    assert len(reports) == 1 and "a cat in the style of blob" in page
    assert 'src="http' not in page and 'href="http' not in page.replace(
        'href="https://www.w3.org', ""
    )


ANOTHER = [
    {"scope": "global"},
    {"query_form": "slider"},
    {"epochs": 3},
    {"damping": 0.1},
    {"gen_guidance_scale": 2.0},
    {"negative_prompts": "a dog|a tree"},
    {"negative_prompt": "a tree"},
    {"target_concepts": "blob,cat"},
    {"top_k": 2},
]


def test_no_question_takes_the_place_of_another_and_the_index_lists_all(answered):
    computed = answered
    for changes in (*ANOTHER, {}, {"batch_size": 3}):
        assert run("attribute", computed, **changes) == 0
    base = computed["results_dir"] / "free_query"
    found = [path.parent.name for path in base.glob("[!.l]*/report.html")]
    assert len(found) == 1 + len(ANOTHER)
    index = (base / "index.html").read_text()
    assert all(f'href="{name}/report.html"' in index for name in found) and "SCOPE=global" in index
    assert sorted(p.name for p in base.iterdir()) == sorted(
        [*found, ".rows", "index.html", "latest"]
    )


def test_runs_of_one_question_at_once_all_succeed_and_leave_one_whole_answer(computed, tmp_path):
    argv, told = line_of("attribute", computed), [tmp_path / f"told-{i}.txt" for i in range(3)]
    runs = [kills.start(argv, tmp_path, path) for path in told]
    for process in runs:
        process.join(100)
    assert [process.exitcode for process in runs] == [0, 0, 0], [p.read_text() for p in told]
    base = computed["results_dir"] / "free_query"
    (report,) = base.glob("[!.l]*/report.html")
    for target in ("cat", "blob"):
        assert (report.parent / f"target_{target}/metrics.json").exists()
    assert not [p for p in base.rglob("*") if ".part" in p.name]


def gradient_written(flags, target="cat"):
    """{file: when it was written} of the kept rows of a target."""
    kept = flags["results_dir"].glob(f"free_query/.rows/{target}-*.npy")
    return {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.parametrize(
    "changes,again",
    [
        ({}, False),
        ({"top_k": 2}, False),
        ({"damping": 1.0}, False),
        ({"epochs": 3}, True),
        ({"negative_prompts": "a dog|a tree"}, True),
        ({"negative_prompt": "a tree"}, True),
        ({"scope": "global"}, True),
        ({"gen_guidance_scale": 2.0}, True),
        ({"gen_num_inference_steps": 5}, True),
        ({"force_recompute_concept_grad": 1}, True),
    ],
)
def test_a_cached_gradient_is_used_exactly_when_everything_that_went_into_it_is_the_same(
    changes, again, answered
):
    computed = answered
    before = gradient_written(computed)
    assert run("attribute", computed, **changes) == 0
    assert (gradient_written(computed) != before) == again


def test_a_damaged_cached_gradient_is_computed_again(answered):
    computed = answered
    (path,) = computed["results_dir"].glob("free_query/.rows/cat-*.npy")
    good = path.read_bytes()
    path.write_bytes(good[:-4] + b"\0\0\0\0")
    assert run("attribute", computed) == 0
    assert path.read_bytes() == good


def test_two_runs_give_the_same_ranking(made, tmp_path):
    elsewhere = {**made, "grad_dir": tmp_path / "grads2", "results_dir": tmp_path / "results2"}
    assert run("train-grad", elsewhere) == run("attribute", elsewhere) == 0
    for target in ("cat", "blob"):
        one, two = target_folder(made, target), target_folder(elsewhere, target)
        lists = sorted(p.name for p in one.glob("topk-prompts-*.txt"))
        assert len(lists) == 9 and all(
            (one / n).read_bytes() == (two / n).read_bytes() for n in lists
        )


def dying(argv):
    """The verb in a process that dies before it keeps its fourth batch."""
    append, calls = Store.append, []

    def once(self, *args):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, *args)

    Store.append = once
    cli.main(argv)


def test_a_killed_train_grad_resumes_and_ends_with_the_same_rows(flags, tmp_path):
    """It dies by SIGKILL in the middle of its second shard."""
    flags |= {"batch_size": 2}
    process = kills.SERVER.Process(target=dying, args=(line_of("train-grad", flags),))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    folder = store_folder(flags)
    first = (folder / "train_grad-0.npy").stat().st_mtime_ns
    assert not (folder / "train_grad-1.npy").exists()
    assert (
        run("train-grad", flags) == 0 and run("train-grad", flags, grad_dir=tmp_path / "whole") == 0
    )
    assert (folder / "train_grad-0.npy").stat().st_mtime_ns == first
    for i in range(3):
        whole = store_folder({"grad_dir": tmp_path / "whole"})
        assert (folder / f"train_grad-{i}.npy").read_bytes() == (
            whole / f"train_grad-{i}.npy"
        ).read_bytes()


@pytest.mark.parametrize(
    "recipe,changes",
    [("reference", {"nfe": 3}), ("default", {"ddim_inversion": 1}), ("default", {"f": "dsm"})],
)
def test_every_recipe_runs_from_gradients_to_report(recipe, changes, flags):
    changes = {"recipe": recipe, **changes}
    assert run("train-grad", flags, **changes) == run("attribute", flags, **changes) == 0
    assert list(flags["results_dir"].rglob("report.html"))


def test_unlabelled_pictures_of_ones_own_give_a_report_without_truths(flags, tiny_data, tmp_path):
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    pictures = sorted(tiny_data.glob("*.png"))
    for path in pictures:
        (own / "images" / path.name).write_bytes(path.read_bytes())
    (own / "captions.txt").write_text("".join(f"a picture of {p.stem}\n" for p in pictures))
    changes = {"data_dir": own, "prompt": "zebra, by Monet", "target_concepts": "zebra|Monet"}
    assert run("train-grad", flags, **changes) == run("attribute", flags, **changes) == 0
    assert list(flags["results_dir"].rglob("report.html"))


def sub_commands():
    """{verb: its parser with all flags}."""
    actions = cli.parser()._subparsers._group_actions
    return {name: sub.complete() for name, sub in actions[0].choices.items()}


def test_every_setting_is_a_flag_of_every_verb_that_computes():
    computing_nothing = {"download-abc", "download-train-grad", "tables"}  # no setting bears on it
    verbs = sub_commands()
    own = {
        "bench",
        "bench-scoring",
        "bench-index",
        "bench-service",
        "bench-cluster",
        "labelled",
        "train-token",
        "truth",
        "export",
    }
    own |= {
        "small-abc",
        "cad-images",
        "cad",
        "cad-erase",
        "cad-amplify",
        "cad-eval",
        "cad-verify",
        "cad-replay",
        "cad-counterfactual",
        "cad-rare",
        "cad-protocol",
        "cad-bench-sd14",
    }
    assert set(verbs) == {*VERBS, *own, *computing_nothing}
    flags = {f"--{name.replace('_', '-')}" for name in names()}
    for verb in set(verbs) - computing_nothing:
        assert flags <= set(verbs[verb]._option_string_actions)


def helped(capsys, *arguments):
    """The help that a command shows, its lines joined."""
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_the_help_lists_every_verb_with_a_sentence(capsys):
    shown = helped(capsys)
    for name, verb in VERBS.items():
        assert f" {name} {verb.help}" in shown
    for name in sub_commands():
        assert f" {name} " in shown


def test_the_help_of_a_verb_shows_its_own_settings_with_unit_choices_bounds_and_default(capsys):
    shown = helped(capsys, "attribute")
    assert "What is asked: --prompt TEXT" in shown and "The model: --sd-model-path TEXT" in shown
    assert "--gen-num-inference-steps N" in shown and "(DDIM steps; 2 to 999; default: 50)" in shown
    assert "bf16; default: fp32)" in shown and "default: data/emoji/pipeline)" in shown
    assert shown.endswith(VERBS["attribute"].example)
    for hidden in ("--task-idx", "--source-dir", "--num-queries", "--num-split", "SUPPRESS"):
        assert hidden not in shown
    assert "--task-idx" in helped(capsys, "task-grad")


def test_a_verb_tells_of_each_flag_of_its_own_the_default_and_the_choices():
    told = 0
    for name, sub in sub_commands().items():
        for action in sub._actions:
            if {action.dest} <= {*names(), "benchmark", "help", "level"}:
                continue
            told += 1
            assert re.search(r"(default: .+|required)\)$", action.help), (name, action.dest)
            for choice in action.choices or ():
                shown = f"{action.help} {'' if action.metavar else action.choices}"
                assert str(choice) in shown, (name, action.dest)
            default = action.default
            if default not in (None, "") and not isinstance(default, str):
                assert f"default: {int(default) if isinstance(default, bool) else default})" in (
                    action.help
                )
    assert told > 30


def test_the_help_shows_the_defaults_of_the_benchmark_that_was_named(capsys):
    assert "default: 32768)" in helped(capsys, "train-grad", "--benchmark", "abc")
    assert "default: 4096)" in helped(capsys, "train-grad")


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_uses_settings_that_exist_and_its_example_is_accepted(name):
    verb = VERBS[name]
    assert set(verb.uses) <= {*names(), *SECTIONS}
    arguments = cli.parser().parse_args([name, *shlex.split(verb.example)])
    given = {k for k, v in vars(arguments).items() if k in names() and v is not None}
    stages = [
        field.name for stage in SECTIONS if stage in verb.uses for field in fields(SECTIONS[stage])
    ]
    assert given <= {*verb.uses, *stages} and settings_of(arguments)


@pytest.mark.parametrize("verb", ["attribute", "train-grad", "export"])
def test_the_help_of_a_verb_shows_every_setting_that_it_reads(
    verb, computed, tmp_path, monkeypatch
):
    """Asked by running it with settings that note what is read."""
    settings, read = resolve("emoji", as_given(computed)).on("cpu"), set()
    run = {
        "export": functools.partial(run_export, str(tmp_path / "out"), "numpy"),
        **{name: verb.run for name, verb in VERBS.items()},
    }[verb]
    usual = Settings.__getattr__

    def noting(self, name):
        read.update({name} & set(names()))
        return usual(self, name)

    monkeypatch.setattr(Settings, "__getattr__", noting)
    run(settings, "cpu")
    shown = {field.name for field in sub_commands()[verb].settings.values()}
    assert {"sd_model_path", "layer", "proj_dim"} <= read <= shown


@pytest.mark.parametrize(
    "flag,near",
    [("--promt=a cat", "--prompt"), ("--top_k=3", "--top-k"), ("--task-index=3", "--task-idx")],
)
def test_a_misspelt_flag_is_refused_with_the_nearest_one(flag, near, capsys):
    assert cli.main(["attribute", flag]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert flag in line and f"(did you mean {near}?); see concept-trak attribute --help" in line


def test_who_reads_no_further_ends_a_listing_without_a_word():
    command = isolated.command("concept_trak", "concepts", f"--data-dir={ROOT / 'data/emoji'}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_export_writes_the_rows_of_the_settings_store(computed, tmp_path):
    folder = tmp_path / "exported"
    assert run("export", computed, kind="numpy", out_dir=folder) == 0
    rows = np.load(folder / "rows.npy")
    np.testing.assert_array_equal(rows, Store.open(store_folder(computed)).rows(range(11)))


def test_an_interrupted_run_ends_with_status_130_and_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("concept_trak.verbs.settings_of", interrupted)
    assert cli.main(["attribute"]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_gpu_ids_left_in_the_environment_concern_the_train_gradients_alone(computed):
    """A user who exported them for run_train_grad.sh goes on to attribute."""
    assert run("attribute", computed, gpu_ids="0 1") == 0


LONG = "a cat with " + "very " * 12 + "in the style of blob"


def test_a_target_that_the_text_encoder_does_not_read_is_refused(computed, capfd):
    flags = computed
    capfd.readouterr()
    assert run("attribute", flags, prompt=LONG) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "'blob' is cut off" in told[0] and "in the style of blob" in told[0]
    assert not flags["results_dir"].exists()


def test_other_words_that_are_not_read_are_named_on_the_screen_and_in_the_report(computed, capfd):
    flags = computed
    prompt = "a cat in the style of blob " + "very " * 12 + "lost"
    assert run("attribute", flags, prompt=prompt, target_concepts="cat") == 2  # no such style
    flags |= {"prompt": "a cat " + "very " * 12 + "lost", "target_concepts": "cat"}
    assert run("attribute", flags) == 0
    assert "lost'" in (told := capfd.readouterr().err) and "is not read" in told
    (page,) = flags["results_dir"].rglob("report.html")
    assert "lost" in page.read_text().split("High score")[0].split("Warning")[1]


def test_stores_of_two_dtypes_live_side_by_side_and_each_is_found(computed):
    assert run("train-grad", computed, dtype="bf16") == 0
    stores = sorted(p.parent for p in computed["grad_dir"].glob("*/manifest.json"))
    assert [Store.open(s).identity["rows"]["dtype"] for s in stores] == ["fp32", "bf16"]
    for dtype in ("fp32", "bf16"):
        assert run("attribute", computed, dtype=dtype) == 0


def test_a_store_in_grad_dir_of_another_dtype_does_not_hide_that_of_the_data(
    computed, tiny_data, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "grads").mkdir()
    store_folder(computed).rename(data / "grads" / store_folder(computed).name)
    here = {**computed, "data_dir": data}
    assert run("train-grad", here, dtype="bf16") == 0
    assert run("attribute", here) == run("attribute", here, dtype="bf16") == 0


@pytest.mark.parametrize("verb", ["attribute", "suspects"])
def test_an_answer_records_the_form_of_the_rows_it_was_made_from(computed, capfd, verb):
    told, shards = [], Store.open(store_folder(computed)).num_split
    for form in ({}, {"store_dtype": "bfloat16", "num_split": 7}):
        capfd.readouterr()
        assert run(verb, computed | form) == 0
        told.append("the rows are float16, not bfloat16, and are used as" in capfd.readouterr().out)
        records = [
            *computed["results_dir"].glob("free_query/*/question.json"),
            *computed["results_dir"].glob("suspects/*/suspects.json"),
        ]
        made_by = {json.dumps(json.loads(path.read_text())["settings"]) for path in records}
        (settings,) = map(json.loads, made_by)
        assert (settings["store_dtype"], settings["num_split"]) == ("float16", shards)
    assert told == [False, True]


def test_of_two_stores_that_fit_that_of_store_dtype_is_taken(computed, tiny_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "grads").mkdir()
    store_folder(computed).rename(data / "grads" / store_folder(computed).name)
    here = {**computed, "data_dir": data}
    assert run("train-grad", here, store_dtype="float32") == 0
    for dtype in ("float32", "float16"):
        assert run("attribute", here, store_dtype=dtype) == 0
    records = computed["results_dir"].glob("free_query/*/question.json")
    found = {json.loads(path.read_text())["settings"]["store_dtype"] for path in records}
    assert found == {"float32", "float16"}


def test_a_finished_shard_that_is_damaged_is_told_instead_of_nothing_to_compute(computed, capfd):
    path = store_folder(computed) / "train_grad-1.npy"
    good = path.read_bytes()
    for content in (good[:-1] + bytes([good[-1] ^ 1]), good[:-4], good + b"\0"):
        path.write_bytes(content)
        capfd.readouterr()
        assert run("train-grad", computed) == 2
        assert "make that shard again: SHARDS=1 REPAIR=1 " in capfd.readouterr().err
        assert run("train-grad", computed, shards="0") == 0
        assert run("train-grad", computed, shards="1", repair="1") == 0
        assert path.read_bytes() == good
        assert path.with_name(f"{path.name}.damaged").read_bytes() == content


def test_other_methods_stand_beside_ours_for_one_prompt(answered):
    computed = answered
    alone = target_folder(computed)
    assert run("attribute", computed, methods="concept_trak,das,caption_similarity") == 0
    folder = target_folder(computed)
    assert folder.parent != alone.parent  # neither takes the place of the other
    ours, das = np.load(folder / "scores.npy"), np.load(folder / "scores-das.npy")
    np.testing.assert_array_equal(ours, np.load(alone / "scores.npy"))
    assert das.shape == ours.shape == (9, 11) and not np.allclose(das, ours)
    assert np.load(folder / "scores-caption_similarity.npy").shape == (1, 11)
    asked = json.loads((folder.parent / "question.json").read_text())
    assert asked["methods"] == ["das", "caption_similarity"]
    page = (folder.parent / "report.html").read_text()
    assert "target_cat/scores-das.npy" in page and "target_blob/scores.csv" in page
    pictures = re.findall(r'<a href="([^"]+\.png)"', page)
    assert pictures and all((folder.parent / unquote(name)).is_file() for name in pictures)


@pytest.mark.parametrize("verb", ["attribute", "train-grad"])
def test_too_little_memory_is_told_before_the_work(verb, computed, capsys, monkeypatch):
    """Of a question it is refused; rows can be asked with more of it."""
    flags = computed
    capsys.readouterr()
    monkeypatch.setattr(
        "concept_trak.attribution.answer.generate_query_image", lambda *_: pytest.fail("drawn")
    )
    assert run(verb, flags, max_memory="100") == (2 if verb == "attribute" else 0)
    told = capsys.readouterr().err
    start = "error: " if verb == "attribute" else "warning: to answer from these rows: "
    assert any(line.startswith(start) and "MAX_MEMORY" in line for line in told.splitlines())
    assert "Traceback" not in told


def test_more_scores_than_memory_holds_are_refused_before_the_picture(
    computed, capsys, monkeypatch
):
    flags = computed
    monkeypatch.setattr(
        "concept_trak.attribution.answer.generate_query_image", lambda *_: pytest.fail("drawn")
    )
    monkeypatch.setattr("concept_trak.attribution.answer.DAMPINGS", range(10**9))
    assert run("attribute", flags) == 2
    assert "scores take" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb, changes, said",
    [
        ("concepts", {}, "on concepts"),
        ("attribute", {"weights": 0}, "without WEIGHTS=1"),
        ("cad-images", {}, "on cad-images"),
        ("attribute", {"weights": 1}, ""),
        ("cad-erase", {}, ""),
        ("cad-protocol", {}, ""),
        ("concepts", {"edits": ""}, ""),
    ],
)
def test_edits_that_have_no_effect_are_told(verb, changes, said, flags, capsys):
    """Not refused: scripts pass on what was exported for others."""
    given = {"edits": "no.safetensors", "data_dir": flags["data_dir"]} | changes
    line = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    settings_of(cli.parser().parse_args([verb, *line]))
    told = capsys.readouterr().err
    assert told.count("EDITS has no effect") == bool(said) and said in told


@pytest.mark.parametrize(
    "verb, flag",
    [
        ("export", "--out-dir"),
        ("bench-index", "--workdir"),
        ("bench-scoring", "--workdir"),
        ("download-abc", "--data-dir"),
        ("download-train-grad", "--grad-root"),
        ("train-token", "--out-dir"),
        ("attribute", "--results-dir"),
        ("train-grad", "--grad-dir"),
        ("serve", "--data-dir"),
        ("explore", "--results-dir"),
    ],
)
def test_an_empty_path_is_refused_by_every_verb(verb, flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, f"{flag}="]) == 2
    told = capsys.readouterr().err
    assert "empty" in told and told.count("\n") == 1 and not [*tmp_path.iterdir()]
