"""How a network may use its modules: rows equal autograd's, or one line names the module."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.utils.checkpoint import checkpoint

from concept_trak.errors import UserError
from concept_trak.gradients import layer_rules
from concept_trak.gradients.sample_grads import dense
from concept_trak.gradients.vjp import PerSampleVjp


class Made(nn.Module):
    """A network of named modules and one function of (network, x)."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)
        torch.manual_seed(3)
        for p in self.parameters():
            if p.is_floating_point():
                nn.init.normal_(p, std=0.5)

    def forward(self, x):
        return self.run(self, x)


def autograd_rows(network, x, v, names):
    """[B, P]: a picture at a time."""
    chosen = [dict(network.named_parameters())[name] for name in names]
    before = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(False)
    rows = []
    for p in chosen:
        p.requires_grad_()
    for i in range(len(x)):
        found = torch.autograd.grad(
            network(x[i : i + 1].clone().requires_grad_()),
            chosen,
            v[i : i + 1],
            allow_unused=True,
            materialize_grads=True,
        )
        rows.append(torch.cat([g.to_dense().flatten().float() for g in found]))
    for p, wanted in zip(network.parameters(), before, strict=True):
        p.requires_grad_(wanted)
    return torch.stack(rows)


def tape_rows(network, x, v, layer, states=1):
    with PerSampleVjp(network, layer) as tape:
        for _ in range(states):
            rows = dense(tape.vjp(network(x), v))
    return rows, list(tape.parameters)


def linear(i=6, o=6, **more):
    return nn.Linear(i, o, **more)


def tokens(batch=3, length=5):
    return torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(batch))


def image(batch=3):
    return torch.randn(batch, 4, 6, 5, generator=torch.Generator().manual_seed(batch))


def checkpointed(n, x, reentrant=False):
    for block in (n.one, n.two):
        x = checkpoint(lambda h, block=block: torch.tanh(block(h)), x, use_reentrant=reentrant)
    return n.out(x)


def routed(n, x):
    """Each token by one of two experts, tokens of all samples in one list."""
    flat = x.flatten(0, 1)
    first = flat[:, 0] > 0
    return n.out(
        torch.where(first[:, None], flat, 0).index_put((first,), n.lin(flat[first]))
    ).view_as(x)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 3 * self.weight, self.bias)


class Gain(nn.Module):
    """No rule of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x * torch.exp(self.gain)


def shared_weight(n):
    n.b.weight = n.a.weight
    return n


def hooked(n):
    n.lin.register_forward_hook(lambda m, args, out: 2 * out)
    n.lin.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return n


def relu_in_place(n, x):
    return n.out(F.relu(n.lin(x), inplace=True))


def add_in_place(n, x):
    y = n.lin(x)
    y += x
    return n.out(y)


def used_thrice(n, x):
    h = torch.tanh(n.lin(torch.tanh(n.lin(x))))
    return n.out(h + n.lin(x[:, :2]).mean(1, keepdim=True))


def ids(n, x):
    """Token numbers of all samples in one list; 0 is padding."""
    return n.out(n.table((x.flatten(0, 1)[:, 0] > 0).long()).view_as(x))


def frames(n, x):
    """Frames of all samples in one batch, as video networks have them."""
    y = n.norm(n.conv(x.flatten(0, 1)[:, None, :, None]))
    return n.out(y.mean((1, 3)).view_as(x))


RIGHT = {  # name: (network, its input, LAYER)
    "several uses of different lengths": (used_thrice, {"lin": linear()}, "lin"),
    "tokens of all samples in one list": (
        lambda n, x: n.out(n.lin(x.flatten(0, 1)).view_as(x)), {"lin": linear()}, "lin"),
    "a norm of such tokens": (
        lambda n, x: n.out(n.norm(x.flatten(0, 1)).view_as(x)), {"norm": nn.LayerNorm(6)}, "norm"),
    "windows": (
        lambda n, x: n.out(n.lin(x.unfold(1, 1, 1).mT.flatten(0, 1))).view_as(x),
        {"lin": linear()}, "lin"),
    "frames": (frames, {"conv": nn.Conv2d(1, 4, 3, padding=1), "norm": nn.GroupNorm(2, 4)},
        "conv|norm"),
    "numbers in one list, with padding": (
        ids, {"table": nn.Embedding(4, 6, padding_idx=0)}, "table"),
    "a keyword": (lambda n, x: n.out(n.lin(input=x)), {"lin": linear()}, "lin"),
    "an output thrown away": (
        lambda n, x: (n.lin(x), n.lin(torch.tanh(x)))[1], {"lin": linear()}, "lin"),
    "all outputs thrown away": (lambda n, x: (n.lin(x), n.out(x))[1], {"lin": linear()}, "lin"),
    "checkpointing": (checkpointed, {"one": linear(), "two": linear()}, ""),
    "relu in place": (relu_in_place, {"lin": linear()}, "lin"),
    "a sum in place": (add_in_place, {"lin": linear()}, ""),
    "a class that scales": (lambda n, x: n.out(n.lin(x)), {"lin": Scaled(6, 6)}, ""),
    "a module without a rule": (lambda n, x: n.out(n.gain(x)), {"gain": Gain()}, ""),
    "diffusers' RMSNorm": (
        lambda n, x: n.out(n.norm(x)), {"norm": RMSNorm(6, 1e-6, bias=True)}, ""),
    "one module under two names": (lambda n, x: n.out(n.b(torch.tanh(n.a(x)))),
        dict.fromkeys("ab", linear()), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_rows_are_those_of_autograd(name):
    run, modules, layer = RIGHT[name]
    network, x = Made(run, **modules, out=linear()), tokens()
    got, names = tape_rows(network, x, torch.cos(x), layer, states=2)
    want = autograd_rows(network, x, torch.cos(x), names)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("layer", ["a.", "b.", "a.weight|b.weight", ""])
def test_a_parameter_of_two_modules_has_both_parts(layer):
    """Also where LAYER names one of the two."""
    network = shared_weight(
        Made(lambda n, x: n.out(n.b(torch.tanh(n.a(x)))), a=linear(), b=linear(), out=linear())
    )
    got, names = tape_rows(network, tokens(), torch.cos(tokens()), layer)
    assert "a.weight" in names and "b.weight" not in names
    torch.testing.assert_close(got, autograd_rows(network, tokens(), torch.cos(tokens()), names))


def test_a_table_that_is_also_the_last_layer():
    def run(n, x):
        return n.b(torch.tanh(n.a((x[..., 0] > 0).long())) + x)

    network = shared_weight(Made(run, a=nn.Embedding(6, 6), b=linear(bias=False)))
    got, names = tape_rows(network, tokens(), torch.cos(tokens()), "")
    torch.testing.assert_close(got, autograd_rows(network, tokens(), torch.cos(tokens()), names))


def test_hooks_of_others_are_part_of_the_network():
    network = hooked(Made(lambda n, x: n.out(n.lin(x)), lin=linear(), out=linear()))
    got, names = tape_rows(network, tokens(), torch.cos(tokens()), "")
    torch.testing.assert_close(got, autograd_rows(network, tokens(), torch.cos(tokens()), names))


CONVOLUTIONS = {
    "grouped": nn.Conv2d(4, 8, 3, 1, 1, groups=4),
    "two groups, strided, dilated": nn.Conv2d(4, 6, 2, 2, 1, dilation=2, groups=2),
    "same": nn.Conv2d(4, 6, (2, 3), padding="same"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect, strided, grouped": nn.Conv2d(4, 6, 3, 2, 1, groups=2, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 6, (3, 1), padding=(2, 0), padding_mode="replicate", bias=False),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "one axis": nn.Conv1d(4, 6, 3, padding=1, stride=2),
    "one axis, grouped, same": nn.Conv1d(4, 8, 3, padding="same", groups=2, dilation=2),
    "three axes": nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1)),
    "three axes, grouped": nn.Conv3d(4, 8, 2, groups=4),
    "batch norm": nn.BatchNorm2d(4).eval(),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "slopes": nn.PReLU(4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_like(name):
    layer, x = CONVOLUTIONS[name], image()
    if isinstance(layer, nn.Conv1d):
        x = x.flatten(2)
    if isinstance(layer, nn.Conv3d):
        x = x.unflatten(2, (2, 3))
    network = Made(lambda n, x: torch.tanh(n.layer(x)), layer=layer)
    v = torch.cos(network(x).detach())
    got, names = tape_rows(network, x, v, "", states=2)
    want = autograd_rows(network, x, v, names)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def transposed(n, x):
    return n.out(n.lin(x.transpose(0, 1)).transpose(0, 1))


def broadcast(n, x):
    return n.out(torch.tanh(x * n.pos(torch.eye(5, 6)[None])))


def one_vector(n, x):
    return n.out(torch.tanh(x * n.pos(torch.ones(6))))


UNREADABLE = {  # name: (network, its modules, LAYER, input, the module named)
    "tokens before samples": (transposed, {"lin": linear()}, "lin", tokens(3, 4), "lin"),
    "as many tokens as samples": (transposed, {"lin": linear()}, "lin", tokens(4, 4), "lin"),
    "a list, tokens first": (
        lambda n, x: n.out(n.lin(x.mT.permute(2, 0, 1).flatten(0, 1)).view(5, 3, 6).mT.mT.permute(
            1, 0, 2)) if len(x) > 1 else n.out(n.lin(x)),
        {"lin": linear()}, "lin", tokens(), "lin"),
    "broadcast to the batch": (broadcast, {"pos": linear()}, "pos", tokens(), "pos"),
    "one vector for all": (one_vector, {"pos": linear()}, "pos", tokens(), "pos"),
    "one vector, its width a multiple": (one_vector, {"pos": linear()}, "", tokens(6), "pos"),
    "experts": (routed, {"lin": linear()}, "lin", tokens(), "lin"),
    "samples in another order": (
        lambda n, x: n.out(n.lin(x.flip(0)).flip(0)), {"lin": linear()}, "lin", tokens(), "lin"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_told_apart_by_sample_is_refused(name):
    run, modules, layer, x, named = UNREADABLE[name]
    network = Made(run, **modules, out=linear())
    with pytest.raises(UserError, match=rf"^{named}\b.*BATCH_SIZE=1"):
        tape_rows(network, x, torch.cos(x), layer)
    got, names = tape_rows(network, x[:1], torch.cos(x[:1]), layer)  # as the line says
    want = autograd_rows(network, x[:1], torch.cos(x[:1]), names)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def besides(n, x):
    return n.out(n.lin(x) + F.linear(torch.tanh(x), n.lin.weight))


def changed(n, x):
    x = x + 0
    y = n.lin(x)
    x.mul_(2)
    return n.out(y + x)


def one_memory():
    a, b = linear(), linear()
    b.weight = nn.Parameter(a.weight.data.t())
    return {"a": a, "b": b}


def of_eight_bits():
    lin = linear()
    lin.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    return {"lin": lin}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lin = nn.Parameter(torch.zeros(6)), linear()


REFUSED = {
    "a weight used beside its module": (besides, {"lin": linear()}, "lin.weight"),
    "a weight used without its module": (
        lambda n, x: n.out(F.linear(x, n.lin.weight)), {"lin": linear()}, "lin.weight"),
    "an input changed in place": (changed, {"lin": linear()}, "input of lin"),
    "two parameters in one memory": (
        lambda n, x: n.out(n.a(n.b(x))), one_memory(), "b.weight lies in the memory of a.weight"),
    "whole numbers": (lambda n, x: n.out(x), of_eight_bits(), "lin.weight .Linear"),
    "a table of a block": (lambda n, x: n.out(x), {"block": Block()}, "block.table .Block"),
    "two inputs": (
        lambda n, x: n.out(n.two(x, x)), {"two": nn.Bilinear(6, 6, 6)}, "two .Bilinear"),
    "two outputs": (lambda n, x: n.out(n.rnn(x)[0]), {"rnn": nn.GRU(6, 6)}, "rnn .GRU"),
    "attention that asks its last layer's weight": (
        lambda n, x: n.out(n.attn(x, x, x)[0]),
        {"attn": nn.MultiheadAttention(6, 2, batch_first=True)}, "attn.in_proj_weight"),
    "a statistic of the batch": (
        lambda n, x: n.out(n.norm(x.mT).mT), {"norm": nn.BatchNorm1d(6)}, "BatchNorm1d cannot be"),
    "weight norm": (
        lambda n, x: n.out(n.lin(x)),
        {"lin": nn.utils.parametrizations.weight_norm(linear())}, "lin.parametrizations.weight"),
    "reentrant checkpointing": (
        lambda n, x: checkpointed(n, n.out(x), True), {"one": linear(), "two": linear()},
        r"^(one|two) is run without a graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_without_a_rule_is_refused_by_name(name):
    run, modules, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        network = Made(run, **modules, out=linear())
        if name == "two parameters in one memory":
            network.b.weight = nn.Parameter(network.a.weight.data.t())
        tape_rows(network, tokens(), torch.cos(tokens()), "")


def test_columns_of_one_memory_are_parameters_of_their_own():
    whole = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    network = Made(lambda n, x: n.b(torch.tanh(n.a(x))), a=linear(), b=linear())
    network.a.weight, network.b.weight = (nn.Parameter(part) for part in whole.chunk(2, 1))
    got, names = tape_rows(network, tokens(), torch.cos(tokens()), "")
    torch.testing.assert_close(got, autograd_rows(network, tokens(), torch.cos(tokens()), names))


def test_a_network_is_held_against_autograd_once_for_each_shape(monkeypatch):
    network = Made(lambda n, x: n.out(torch.tanh(n.lin(x))), lin=linear(), out=linear())
    held, hold = [], PerSampleVjp._hold_against_autograd
    monkeypatch.setattr(
        PerSampleVjp, "_hold_against_autograd", lambda *a: (held.append(len(a[1])), hold(*a))
    )
    for batch in (3, 3, 2, 3, 2):
        tape_rows(network, tokens(batch), tokens(batch), "lin", states=2)
    assert held == [3, 2]
    assert all(p.grad is None for p in network.parameters())


def test_gradients_that_are_there_already_are_left_alone():
    network = Made(lambda n, x: n.out(n.lin(x)), lin=linear(), out=linear())
    network(tokens()).sum().backward()
    before = [p.grad.clone() for p in network.parameters()]
    tape_rows(network, tokens(), tokens(), "")
    assert all(torch.equal(p.grad, b) for p, b in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_other_precisions_are_not_taken_for_wrong(dtype):
    network = Made(used_thrice, lin=linear(), out=linear()).to(dtype)
    got, names = tape_rows(network, tokens().to(dtype), tokens().to(dtype), "")
    want = autograd_rows(network.float(), tokens(), tokens(), names)
    assert F.cosine_similarity(got, want).min() > 0.999


def test_a_module_of_many_numbers_needs_a_rule(monkeypatch):
    monkeypatch.setattr(layer_rules, "SMALL", 5)
    with pytest.raises(UserError, match="gain.gain .Gain"):
        PerSampleVjp(Made(None, gain=Gain()), "")
