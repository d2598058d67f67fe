"""A launcher that is ended takes the processes of its shards with it."""

import contextlib
import signal
import sys
import time

import kills
import psutil
import pytest

from concept_trak import cli
from concept_trak.attribution import multi_gpu
from concept_trak.errors import UserError


def of_shards(launcher):
    """Its processes, and theirs, that compute a shard."""
    found = []
    for process in launcher.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [process] if "train-grad" in process.cmdline() else []
    return found


def launch(argv):
    """The verb in a process of its own. What makes the store has ended before the shards begin: it
    needs none.
    """
    multi_gpu.create_store_in_subprocess = lambda settings, gpu: multi_gpu._create(settings.on(gpu))
    sys.exit(cli.main(argv))


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
    launcher = kills.SERVER.Process(target=launch, args=(["train-grad", *flags],))
    launcher.start()
    parent, deadline = psutil.Process(launcher.pid), time.monotonic() + 60

    while len(children := of_shards(parent)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) >= 4, "two of accelerate, and theirs"
    parent.send_signal(ending)
    launcher.join(30)
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and launcher.exitcode


def test_a_list_of_no_device_is_refused(tiny_pipeline, tiny_data, tmp_path, capfd):
    places = f"--sd-model-path={tiny_pipeline} --data-dir={tiny_data} --grad-dir={tmp_path}"
    assert cli.main(["train-grad", *places.split(), "--gpu-ids= "]) == 2
    assert "GPU_IDS names no device" in capfd.readouterr().err


MIG = "MIG-GPU-8f6bd1a4/1/0"


@pytest.mark.parametrize(
    "shown, gpu, sees",
    [
        (None, "3", "3"),
        ("4,5", "0", "4"),
        ("4, 5 ", "1", "5"),
        ("2", "0", "2"),
        ("GPU-8932f937,GPU-41b2", "1", "GPU-41b2"),
        (f"{MIG},MIG-c7", "0", MIG),
        (f"{MIG},MIG-c7", "1", "MIG-c7"),
        ("0,-1,3", "0", "0"),
        ("0,-1,3", "1", None),  # CUDA reads the list up to the first that there is not
        ("4,5", "2", None),
        ("", "0", None),
        ("-1", "0", None),
        ("NoDevFiles", "1", None),
    ],
)
def test_a_gpu_is_chosen_within_those_that_are_visible(monkeypatch, shown, gpu, sees):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if sees is None:
        with pytest.raises(UserError, match=f"GPU_IDS names GPU {gpu}, but CUDA_VISIBLE_DEVICES="):
            multi_gpu.visible(gpu)
    else:
        assert multi_gpu.visible(gpu) == sees


@pytest.mark.parametrize("ids, shown", [("0", None), ("cpu 1", "0"), ("0 1", "GPU-5f"), ("7", "")])
def test_a_gpu_that_is_not_there_is_told_before_the_model_is_loaded(
    tiny_pipeline, tiny_data, tmp_path, capfd, monkeypatch, ids, shown
):
    monkeypatch.setattr(multi_gpu, "create_store_in_subprocess", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 if shown else 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    places = f"--sd-model-path={tiny_pipeline} --data-dir={tiny_data} --grad-dir={tmp_path}"
    assert cli.main(["train-grad", *places.split(), f"--gpu-ids={ids}"]) == 2
    told = capfd.readouterr().err
    assert "GPU_IDS names GPU" in told and told.count("\n") == 1
