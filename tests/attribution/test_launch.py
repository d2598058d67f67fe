"""A launcher that is ended takes the processes of its shards with it."""

import contextlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from concept_trak import cli
from concept_trak.settings import ROOT


def of_shards(launcher):
    """Its processes, and theirs, that compute a shard."""
    found = []
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [process] if "train-grad" in process.cmdline() else []
    return found


@pytest.mark.parametrize(
    "ending",
    [
        signal.SIGTERM,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGKILL)),
    ],
)
def test_a_launcher_that_is_ended_leaves_no_process(tiny_pipeline, tiny_data, tmp_path, ending):
    places = f"--sd-model-path={tiny_pipeline} --data-dir={tiny_data} --grad-dir={tmp_path}"
    flags = [*places.split(), "--gpu-ids=cpu cpu", "--num-split=2", "--proj-dim=32"]
    flags.append("--epochs=500")  # so that none is done before the other has begun
    command = [sys.executable, "-m", "concept_trak", "train-grad", *flags]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    parent, deadline = psutil.Process(launcher.pid), time.monotonic() + 60

    while len(children := of_shards(parent)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) >= 4, "two of accelerate, and theirs"
    launcher.send_signal(ending)
    launcher.communicate(timeout=30)
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and launcher.returncode != 0


def test_a_list_of_no_device_is_refused(tiny_pipeline, tiny_data, tmp_path, capfd):
    places = f"--sd-model-path={tiny_pipeline} --data-dir={tiny_data} --grad-dir={tmp_path}"
    assert cli.main(["train-grad", *places.split(), "--gpu-ids= "]) == 2
    assert "GPU_IDS names no device" in capfd.readouterr().err
