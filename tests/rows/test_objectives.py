"""Cotangents against the losses they stand for."""

import pytest
import torch

from concept_trak.models import ddim as diffusion
from concept_trak.rows import featurize, objectives
from concept_trak.rows.vjp import PerSampleVjp, dense


def batch(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 2, 4, 4, generator=g),
        torch.randn(n, 2, 4, 4, generator=g),
        torch.randn(n, 5, 6, generator=g),
    ]


def dps_of(denoiser, x_t, x0, cond, t=500):
    x_t = x_t.clone().requires_grad_()
    return objectives.dps(denoiser.eps(x_t, t, cond), x_t, x0, float(denoiser.alpha_bar[t]))


def test_dps_equals_autograd_of_its_definition(tiny_denoiser):
    x_t, x0, cond = batch()
    x = x_t.clone().requires_grad_()
    x0_hat = diffusion.predict_x0(
        x, tiny_denoiser.eps(x, 500, cond), float(tiny_denoiser.alpha_bar[500])
    )
    want = -torch.autograd.grad((x0_hat - x0).square().flatten(1).mean(1).sum(), x)[0]
    torch.testing.assert_close(dps_of(tiny_denoiser, x_t, x0, cond), want, rtol=1e-4, atol=1e-6)


def test_dps_does_not_depend_on_batch_size(tiny_denoiser):
    x_t, x0, cond = batch()
    singles = [
        dps_of(tiny_denoiser, x_t[i : i + 1], x0[i : i + 1], cond[i : i + 1]) for i in range(4)
    ]
    torch.testing.assert_close(
        dps_of(tiny_denoiser, x_t, x0, cond), torch.cat(singles), rtol=1e-4, atol=1e-6
    )


def test_dps_points_to_states_from_which_the_picture_is_predicted_better(tiny_denoiser):
    x_t, x0, cond = batch()
    g = dps_of(tiny_denoiser, x_t, x0, cond)

    def error(x):
        with torch.no_grad():
            return (
                (
                    diffusion.predict_x0(
                        x, tiny_denoiser.eps(x, 500, cond), float(tiny_denoiser.alpha_bar[500])
                    )
                    - x0
                )
                .square()
                .flatten(1)
                .mean(1)
            )

    assert (error(x_t + 1e-3 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)) < error(x_t)).all()


@pytest.mark.parametrize(
    "name,loss",
    [
        ("dsm", lambda e, eps, other: (e - eps).square().sum() / 2),
        ("dtrak", lambda e, eps, other: e.square().sum() / 2),
        ("das", lambda e, eps, other: e.abs().sum()),
        (
            "contrast",
            lambda e, eps, other: ((e + 1.0 * (e - other)).detach() - e).square().sum() / 2,
        ),
    ],
)
def test_cotangent_is_the_gradient_of_its_loss_by_eps_hat(name, loss):
    eps_hat, eps, _ = batch(seed=1)
    other = batch(seed=2)[0]
    leaf = eps_hat.clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf, eps, other), leaf)[0]
    arguments = {
        "dsm": (eps_hat, eps),
        "dtrak": (eps_hat,),
        "das": (eps_hat,),
        "contrast": (eps_hat, other),
    }[name]
    torch.testing.assert_close(getattr(objectives, name)(*arguments), want)


def step_against(denoiser, x_t, t, cond, v):
    """Change of eps_hat [1, ...] after a small step of the attn2 weights against the gradient that
    the cotangent v makes.
    """
    with PerSampleVjp(denoiser.network, "attn2") as tape:
        before = denoiser.eps(x_t, t, cond)
        flat = dense(tape.vjp(before, v))[0]
        with torch.no_grad():
            for name, p in tape.parameters.items():
                p -= 1e-2 * (
                    flat[tape.offsets[name] : tape.offsets[name] + p.numel()] / flat.norm()
                ).view_as(p)
            return denoiser.eps(x_t, t, cond) - before.detach()


def test_a_step_against_the_dps_gradient_moves_the_prediction_along_minus_g(tiny_denoiser):
    x_t, x0, cond = batch(1)
    g = dps_of(tiny_denoiser, x_t, x0, cond)
    assert (step_against(tiny_denoiser, x_t, 500, cond, g) * -g).sum() > 0


def test_a_step_against_the_slider_gradient_strengthens_the_concept(tiny_denoiser):
    x_t, _, cond = batch(1)
    with torch.no_grad():
        more = tiny_denoiser.eps(x_t, 500, cond) - tiny_denoiser.eps(
            x_t, 500, torch.zeros_like(cond)
        )
    assert (step_against(tiny_denoiser, x_t, 500, cond, -more) * more).sum() > 0


def test_train_and_query_agree_in_sign(tiny_denoiser):
    """The train row of a picture and the query of its caption, read at the same states, point the
    same way.
    """
    from concept_trak.rows.projection import make_projection
    from concept_trak.rows.query import concept_gradient

    _, x0, cond = batch(1)
    null, states = torch.zeros(1, 5, 6), featurize.noised_states(5)
    projection = make_projection(
        "identity", PerSampleVjp(tiny_denoiser.network, "attn2").input_dim, 0, 0
    )
    row, _ = featurize.featurize(
        tiny_denoiser,
        projection,
        x0,
        cond,
        null,
        layer="attn2",
        objective="presence",
        states=states,
        normalize=True,
    )
    read = featurize.states_of(tiny_denoiser, x0, cond, null, states)
    asked = concept_gradient(
        tiny_denoiser, projection, read, cond, null, layer="attn2", normalize=True
    )
    torch.testing.assert_close(asked * len(states.timesteps), row, rtol=1e-4, atol=1e-6)
