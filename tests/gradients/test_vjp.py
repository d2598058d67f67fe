"""The VJP engine against vmap(grad), on text-conditional and class-conditional networks."""

import pytest
import torch
from conftest import tiny_unet
from oracles import vmap_gradients
from torch import nn

from concept_trak.errors import UserError
from concept_trak.gradients.sample_grads import OuterProductGrad, dense, module_layout
from concept_trak.gradients.vjp import PerSampleVjp


def unet_call(net, x, t, cond):
    return net(x, t, encoder_hidden_states=cond).sample


class TinyDiT(nn.Module):
    """Class-conditional block with every kind of parameter the engine has a rule for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.patch, self.label = nn.Conv2d(2, 8, 2, stride=2), nn.Embedding(5, 8)
        self.norm, self.rms, self.group = nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)
        self.mlp, self.modulate, self.out = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x, label):
        h = self.patch(x)
        tokens = h.flatten(2).transpose(1, 2) + self.modulate(self.label(label))[:, None]
        tokens = tokens + self.mlp(self.rms(self.norm(tokens)))
        tokens = tokens + self.mlp(tokens)  # used twice: contributions add up
        return self.out(self.group(tokens.transpose(1, 2).reshape(h.shape)))


def text_case(batch=3):
    g = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(batch, 2, 4, 4, generator=g),
        torch.tensor([10, 500, 900][:batch]),
        torch.randn(batch, 5, 6, generator=g),
    )
    return tiny_unet(), inputs, torch.randn(batch, 2, 4, 4, generator=g)


@pytest.mark.parametrize("layer", ["attn2", "", "attn1.to_q|attn2.to_v", "conv1", "norm"])
def test_hooks_equal_vmap_on_a_text_conditional_unet(layer):
    network, inputs, v = text_case()
    with PerSampleVjp(network, layer) as tape:
        got = dense(tape.vjp(unet_call(network, *inputs), v))
    want = vmap_gradients(network, unet_call, list(tape.parameters), inputs, v)
    assert got.shape == (3, tape.input_dim)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_hooks_equal_vmap_on_a_class_conditional_network():
    network, g = TinyDiT(), torch.Generator().manual_seed(0)
    inputs, v = (
        (torch.randn(4, 2, 4, 4, generator=g), torch.tensor([0, 3, 3, 1])),
        torch.randn(4, 8, 2, 2, generator=g),
    )
    with PerSampleVjp(network, "") as tape:
        got = dense(tape.vjp(network(*inputs), v))
    want = vmap_gradients(network, lambda net, x, y: net(x, y), list(tape.parameters), inputs, v)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_grads_equal_loop_of_one_and_do_not_depend_on_the_batch():
    network, inputs, v = text_case()
    with PerSampleVjp(network, "attn2") as tape:
        whole = dense(tape.vjp(unet_call(network, *inputs), v))
        single = torch.cat(
            [
                dense(tape.vjp(unet_call(network, *[x[i : i + 1] for x in inputs]), v[i : i + 1]))
                for i in range(3)
            ]
        )
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-6)


def test_norms_and_gathered_entries_equal_those_of_the_dense_gradient():
    network, inputs, v = text_case()
    with PerSampleVjp(network, "") as tape:
        grads = tape.vjp(unet_call(network, *inputs), v)
    rows = dense(grads)
    torch.testing.assert_close(
        sum(g.sq_norm() for g in grads), rows.square().sum(1), rtol=1e-4, atol=1e-6
    )
    for g in grads[::7]:
        index = torch.arange(0, g.numel, 3)
        torch.testing.assert_close(
            g.gather(index), rows[:, g.offset : g.offset + g.numel][:, index], rtol=1e-4, atol=1e-6
        )
    positions_few = OuterProductGrad(0, torch.randn(2, 1, 30), torch.randn(2, 1, 20))
    torch.testing.assert_close(positions_few.sq_norm(), positions_few.dense().square().sum(1))


def test_coordinate_order_is_that_of_named_parameters():
    network = tiny_unet()
    tape = PerSampleVjp(network, "attn2")
    names = [n for n, _ in network.named_parameters() if "attn2" in n]
    assert (
        list(tape.offsets) == names
        and tape.offsets[names[1]] == dict(network.named_parameters())[names[0]].numel()
    )
    assert [n.split("_")[0] for n in names] == sorted(
        [n.split("_")[0] for n in names], key=["down", "up", "mid"].index
    )


def test_an_unknown_layer_is_refused_and_names_the_choices():
    with pytest.raises(UserError, match="attn2"):
        PerSampleVjp(tiny_unet(), "no_such_layer")


def test_a_selected_weight_that_the_forward_does_not_use_is_refused():
    network = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    x = torch.randn(1, 2)
    with PerSampleVjp(network, "") as tape, pytest.raises(UserError, match="unused.weight"):
        tape.vjp(network["used"](x), torch.ones(1, 2))


def test_a_parameter_without_a_rule_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.child = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

    with pytest.raises(UserError, match="position"):
        PerSampleVjp(Odd(), "")


def test_requires_grad_flags_and_hooks_are_restored():
    network, inputs, v = text_case()
    with PerSampleVjp(network, "attn2") as tape:
        tape.vjp(unet_call(network, *inputs), v)
    assert all(p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())


def test_gradients_of_several_predictions_of_a_sample_are_summed():
    network, (x, t, cond), v = text_case()
    other, w = torch.flip(cond, [0]), torch.flip(v, [0])
    with PerSampleVjp(network, "attn2") as tape:
        both = tape.vjp(
            unet_call(network, torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, other])),
            torch.cat([v, w]),
            samples=3,
        )
        want = dense(tape.vjp(unet_call(network, x, t, cond), v)) + dense(
            tape.vjp(unet_call(network, x, t, other), w)
        )
    torch.testing.assert_close(dense(both), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        sum(g.sq_norm() for g in both), want.square().sum(1), rtol=1e-4, atol=1e-6
    )


def test_the_layout_keeps_the_tensors_of_a_module_together():
    network = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(3, 4, 5, bias=False), nn.LayerNorm(6))
    assert module_layout(dict(network.named_parameters())) == [
        [(3, 2), (3,)],
        [(4, 3, 5, 5)],
        [(6,), (6,)],
    ]
