"""The verbs with a store that lies elsewhere, or that several jobs fill."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from concept_trak import cli
from concept_trak.settings import ROOT
from concept_trak.store import remote
from concept_trak.store.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
import s3  # noqa: E402

SMALL = ["--num-split=2", "--proj-dim=32", "--batch-size=2"]


def contents(folder):
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found.pop("manifest.json")  # tells the time it was made
    found.pop("pictures.json", None)  # fetched by whoever wants it
    return found


@pytest.fixture
def local(tiny_pipeline, tiny_data, tmp_path):
    """(flags of the model and the pictures, the folder of a store made on disk)."""
    flags = [f"--sd-model-path={tiny_pipeline}", f"--data-dir={tiny_data}", *SMALL]
    assert cli.main(["train-grad", *flags, f"--grad-dir={tmp_path / 'local'}"]) == 0
    (folder,) = (tmp_path / "local").iterdir()
    return flags, folder


def test_rows_on_s3_are_made_resumed_and_scored(local, tmp_path, monkeypatch, capsys):
    """One machine makes a shard, another the other; a third answers from what it fetches, and gets
    the rows that a local run makes.
    """
    pytest.importorskip("obstore", reason="obstore is not installed (extra s3)")
    server = s3.Server(tmp_path / "moto.log")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    remote.filesystem.cache_clear()
    bucket = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/bucket", method="PUT")
    urllib.request.urlopen(bucket).close()
    flags, folder = local
    there = [*flags, "--grad-dir=s3://bucket/grads"]

    def machine(name):
        return f"--store-cache={tmp_path / name}"

    try:
        for number in (0, 1):
            asked = [f"--shards={number}", machine(f"machine{number}")]
            assert cli.main(["train-grad", *there, *asked]) == 0
        assert "s3://bucket/grads/" in capsys.readouterr().out
        assert cli.main(["train-grad", *there, machine("machine0")]) == 0
        assert " 0 of 11 rows to compute" in capsys.readouterr().out
        out = f"--out-dir={tmp_path / 'exported'}"
        assert cli.main(["export", *there, machine("third"), out]) == 0
        assert "fetching" in capsys.readouterr().out
        base = remote.local_base("s3://bucket/grads", str(tmp_path / "third"))
        assert contents(base / folder.name) == contents(folder)
        assert Store.open(folder).checksum == Store.open(base / folder.name).checksum
    finally:
        server.stop()
        remote.filesystem.cache_clear()


@pytest.mark.slow
def test_an_array_of_jobs_fills_one_store(local, tmp_path):
    """The Slurm example, run as Slurm would, by two array tasks of three shards."""
    flags, _ = local
    flags = [flag for flag in flags if "num-split" not in flag]
    for task in (0, 1):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        given = {"NUM_SPLIT": "3", "PYTHON_BIN": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT)}
        command = ["bash", "scripts/slurm_array.sh", *flags, f"--grad-dir={tmp_path / 'array'}"]
        environment = {**os.environ, **slurm, **given}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
        (folder,) = (tmp_path / "array").iterdir()
        assert Store.read_manifest(folder).pending() == ([1] if task == 0 else [])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--executor=gpus"], "GPU_IDS names no device"),
        (["--executor=slurm"], "EXECUTOR"),
        (["--executor=ray", "--num-cpus=-1"], "NUM_CPUS"),
        (["--piece-rows=0"], "PIECE_ROWS"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(
    tiny_pipeline, tiny_data, tmp_path, capsys, flags, said
):
    places = [f"--sd-model-path={tiny_pipeline}", f"--data-dir={tiny_data}"]
    assert cli.main(["train-grad", *places, f"--grad-dir={tmp_path}", *flags]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_without_ray_the_extra_is_named(tiny_pipeline, tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    places = [f"--sd-model-path={tiny_pipeline}", f"--data-dir={tiny_data}"]
    assert cli.main(["train-grad", *places, f"--grad-dir={tmp_path}", "--executor=ray"]) == 2
    assert "pip install 'concept-trak[cluster]'" in capsys.readouterr().err
