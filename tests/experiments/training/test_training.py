"""The training loop: its schedule, its average, its losses, and what a resumed run comes to."""

import contextlib
import json
import math

import pytest
import torch
from torch import nn

from concept_trak.errors import UserError
from experiments.training.loop import (
    Ema,
    LrPhase,
    Run,
    TrainingState,
    learning_rate,
    load_averages,
    load_checkpoint,
    phase_of,
    phases_until,
    run_training,
    running_mean,
    save_checkpoint,
    step_generator,
)

PHASES = (LrPhase(6, 10), LrPhase(6, 6, peak=0.5))


def run_of(folder, **changes):
    options = {"lr": 0.05, "save_every": 5, "weight_decay": 0.01, "phases": PHASES} | changes
    return Run(folder / "net.safetensors", warmup=3, ema_decay=0.9, **options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net, stop=None):
    """A regression whose batch of step s is drawn from (7, s); dies before step `stop`."""

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        g = step_generator(7, step)
        x = torch.randn(16, 4, generator=g)
        return (net(x) - x.sum(1, keepdim=True).sin()).square().mean()

    return loss


def trained(folder, stop=None, net=None, **changes):
    """(network, its average, the checkpoint's tensors and state) after a run to its end."""
    net = net or network()
    run = run_of(folder, **changes)
    ema = run_training(dict(net.named_parameters()), loss_of(net, stop), run)
    return net, ema, *load_checkpoint(run.checkpoint)


def test_a_run_that_is_killed_and_continued_ends_bit_identical(tmp_path):
    """Weights, average and AdamW's moments; the log has no line twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    _, ema, tensors, state = trained(whole)
    for stop in (3, 7, 11):  # before the first checkpoint, and after each
        with pytest.raises(KeyboardInterrupt):
            trained(killed, stop)
    net, again, resumed, end = trained(killed)
    assert end == state and end["step"] == 12 and resumed.keys() == tensors.keys()
    assert all(torch.equal(resumed[k], tensors[k]) for k in tensors)
    assert all(torch.equal(again.shadow[k], ema.shadow[k]) for k in ema.shadow)
    assert all(torch.equal(p, tensors[f"param/{k}"]) for k, p in net.named_parameters())
    assert {k.partition("/")[0] for k in tensors} == {"param", "ema", "exp_avg", "exp_avg_sq"}


def test_a_resumed_run_goes_on_at_its_checkpoint_and_not_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop=8)
    net, steps = network(), []
    loss = loss_of(net)
    run_training(
        dict(net.named_parameters()), lambda s: steps.append(s) or loss(s), run_of(tmp_path)
    )
    assert steps == list(range(5, 12))


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"lr": 0.1}, {"made_from": {"data": "other"}}], ids=str
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(change, tmp_path):
    trained(tmp_path)
    before = (tmp_path / "net.safetensors").read_bytes()
    name = "data" if "made_from" in change else next(iter(change))
    with pytest.raises(UserError, match=f"made from another {name}; remove it"):
        trained(tmp_path, **change)
    assert (tmp_path / "net.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match="another parameters"):
        trained(tmp_path, net=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    trained(tmp_path)
    path = tmp_path / "net.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged.*remove it") as error:
        trained(tmp_path)
    assert "\n" not in str(error.value)


def test_training_lowers_the_loss_and_the_state_keeps_its_running_mean(tmp_path):
    net, losses = network(), []
    loss = loss_of(net)

    def recorded(step):
        value = loss(step)
        losses.append(value.item())
        return value

    run_training(dict(net.named_parameters()), recorded, run_of(tmp_path))
    mean = None
    for value in losses:
        mean = running_mean(mean, value)
    assert load_checkpoint(tmp_path / "net.safetensors")[1]["mean"] == pytest.approx(mean)
    with torch.no_grad():
        assert loss_of(net)(0).item() < losses[0]


def test_the_average_equals_its_closed_form():
    """ema_n = sum over s of (1 - d_s) prod_{r > s} d_r theta_s + prod_s d_s theta_0."""
    values, decay = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), 0.8
    ema = Ema({"w": values[0]}, decay)
    for step, value in enumerate(values[1:]):
        ema.update({"w": value}, step)
    decays = [min(decay, (1 + s) / (10 + s)) for s in range(19)]
    want = math.prod(decays) * values[0]
    for s in range(19):
        want = want + (1 - decays[s]) * math.prod(decays[s + 1 :]) * values[s + 1]
    torch.testing.assert_close(ema.shadow["w"], want)
    other = {"w": torch.zeros(3)}
    ema.copy_to(other)
    assert torch.equal(other["w"], ema.shadow["w"])


def test_the_learning_rate_warms_up_and_follows_a_cosine_in_every_phase():
    for step in range(12):
        first, length, peak = (0, 10, 1.0) if step < 6 else (6, 6, 0.5)
        cosine = (1 + math.cos(math.pi * (step - first) / length)) / 2
        want = min(1, (step + 1) / 3) * peak * (0.05 + 0.95 * cosine)
        assert learning_rate(step, PHASES, 3) == pytest.approx(want)
    assert phase_of(5, PHASES) == (PHASES[0], 0) and phase_of(6, PHASES) == (PHASES[1], 6)


def test_the_optimizer_gets_the_rate_of_its_step(tmp_path):
    """One step of AdamW without decay moves each weight by about the rate, against its gradient."""
    net = network()
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    run = Run(tmp_path / "one.safetensors", (LrPhase(1, 10),), 0.05, 3, 0.9, 1)
    run_training(dict(net.named_parameters()), loss_of(net), run)
    moved = torch.cat([(p - before[k]).abs().flatten() for k, p in net.named_parameters()])
    rate = 0.05 * learning_rate(0, run.phases, 3)
    torch.testing.assert_close(moved.median(), torch.tensor(rate), rtol=1e-2, atol=0)


def test_later_phases_may_change_and_earlier_ones_may_not(tmp_path):
    longer = (PHASES[0], LrPhase(60, 60))
    assert phases_until(6, PHASES) == phases_until(6, longer) != phases_until(6, (LrPhase(6, 9),))
    assert phases_until(8, PHASES) != phases_until(8, longer)
    for name in ("at once", "in two goes"):
        (tmp_path / name).mkdir()
    trained(tmp_path / "in two goes", phases=PHASES[:1])
    _, _, once, state = trained(tmp_path / "at once")
    _, _, twice, end = trained(tmp_path / "in two goes")
    assert state == end and all(torch.equal(once[k], twice[k]) for k in once)
    with pytest.raises(UserError, match="another phases"):
        trained(tmp_path / "at once", phases=longer)


def test_a_resumed_run_keeps_the_memory_format_of_its_moments(tmp_path):
    """Steps of AdamW are several times slower when it is another than the weights'."""
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    params, run = dict(net.named_parameters()), run_of(tmp_path, phases=(LrPhase(1, 1),))
    run_training(params, lambda s: net(torch.ones(1, 3, 4, 4)).square().sum(), run)
    progress = TrainingState(params, run)
    progress.resume()
    moments = progress.optimizer.state[net.weight]
    assert progress.step == 1 and moments["exp_avg_sq"].norm() > 0
    for key in ("exp_avg", "exp_avg_sq"):
        assert moments[key].is_contiguous(memory_format=torch.channels_last)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path):
    net = network()
    with pytest.raises(FloatingPointError, match="step 0"):
        run_training(
            dict(net.named_parameters()),
            lambda s: net(torch.full((1, 4), math.nan)).sum(),
            run_of(tmp_path),
        )


def test_the_log_has_a_line_every_fifty_steps_and_none_twice_after_a_kill(tmp_path):
    changes, logs = {"phases": (LrPhase(160, 160),), "save_every": 70, "lr": 0.01}, []
    for name, stop in (("whole", None), ("killed", 130)):
        folder = tmp_path / name
        folder.mkdir()
        with contextlib.suppress(KeyboardInterrupt):
            trained(folder, stop, **changes)
        trained(folder, **changes)
        text = (folder / "net.jsonl").read_text()
        logs.append([json.loads(line) | {"seconds": 0} for line in text.splitlines()])
    assert [line["step"] for line in logs[0]] == [50, 100, 150] and logs[0] == logs[1]


def test_a_checkpoint_with_one_changed_value_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"row": torch.ones(4)}, {"step": 2, "mean": 0.5, "identity": {}})
    tensors, state = load_checkpoint(path)
    assert state == {"step": 2, "mean": 0.5, "identity": {}} and tensors["row"].tolist() == [1] * 4
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged .checksum differs.; remove it"):
        load_checkpoint(path)


@pytest.mark.parametrize("state", [{"step": -1}, {"step": "2"}, {"mean": "x"}, {"identity": 3}])
def test_a_checkpoint_whose_state_cannot_be_one_is_refused(tmp_path, state):
    save_checkpoint(tmp_path / "a.safetensors", {"row": torch.ones(4)}, state)
    with pytest.raises(UserError, match="damaged .its state.; remove it"):
        load_checkpoint(tmp_path / "a.safetensors")


def averages(folder, **changes):
    """(whether there are averaged weights, those of a network that had others before)."""
    net = network()
    return load_averages(run_of(folder, **changes), dict(net.named_parameters())), net


def test_averages_are_read_of_the_very_run_that_made_them(tmp_path):
    _, ema, *_ = trained(tmp_path, made_from={"seed": 0, "taught": "a"})
    found, net = averages(tmp_path, made_from={"seed": 0, "taught": "a"})
    assert found and all(torch.equal(p, ema.shadow[n]) for n, p in net.named_parameters())
    others = [{"made_from": made} for made in ({"seed": 1, "taught": "a"}, {"seed": 0}, {})]
    for other in (*others, {"lr": 0.1}):
        with pytest.raises(UserError, match=r"net.safetensors was made from another .*; remove it"):
            averages(tmp_path, **({"made_from": {"seed": 0, "taught": "a"}} | other))
    assert not averages(tmp_path / "none")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("ema/0.bias"),
        lambda tensors: tensors.update({"ema/1.bias": torch.zeros(1)}),
        lambda tensors: tensors.update({"param/0.bias": torch.zeros(1)}),
        lambda tensors: tensors.update({"exp_avg/0.bias": torch.zeros(8, dtype=torch.float64)}),
    ],
)
def test_a_checkpoint_of_other_tensors_is_one_line(change, tmp_path):
    _, _, tensors, state = trained(tmp_path)
    change(tensors)
    save_checkpoint(tmp_path / "net.safetensors", tensors, state)
    for read in (averages, trained):
        with pytest.raises(UserError, match=r"net.safetensors.*(0|1).bias.*; remove it"):
            read(tmp_path)


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused(tmp_path):
    _, _, tensors, state = trained(tmp_path)
    for spoiled in ({**state, "identity": None}, {"step": state["step"]}):
        save_checkpoint(tmp_path / "net.safetensors", tensors, spoiled)
        with pytest.raises(UserError, match="was made from another"):
            trained(tmp_path)
