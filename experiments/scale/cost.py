"""What a recipe costs in forward-equivalents (FE), counted by running it on a small network.

A backward pass to the activations counts as one forward. The count does not depend on the size of
the network, so a few thousand parameters do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from concept_trak.attribution.naming import query_timesteps, train_timesteps
from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import concept_cotangent, train_gradients
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.state import rebatch
from concept_trak.gradients.states import QueryStart, TrainBatch, query_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.condition import Condition
from concept_trak.models.denoiser import NetworkDenoiser
from concept_trak.models.schedule import VariancePreserving
from concept_trak.settings import Settings
from experiments.emoji.model import pipeline as embedded

from .literal_recipe import ReferenceImplementation


class ForwardCounter:
    """Counts samples that pass forward through a network, and backward through its output."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    @contextlib.contextmanager
    def counting(self, network: nn.Module) -> Iterator[ForwardCounter]:
        """Count while the context is open.

        By a forward hook, and `torch.autograd.grad` replaced by one that counts and calls it.
        """
        backward = torch.autograd.grad

        def count_forward(module: nn.Module, args: tuple, output: Any) -> None:
            self.forward += len(args[0])

        def count_backward(
            outputs: torch.Tensor, inputs: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple:
            self.backward += len(outputs if outputs.dim() else inputs)  # a scalar: summed over it
            return backward(outputs, inputs, *args, **kwargs)

        handle = network.register_forward_hook(count_forward)
        torch.autograd.grad = count_backward
        try:
            yield self
        finally:
            torch.autograd.grad = backward
            handle.remove()

    @property
    def total(self) -> int:
        """Forward-equivalents."""
        return self.forward + self.backward


def small_denoiser() -> NetworkDenoiser:
    """A network that the recipes can be counted on in a moment."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    unet.set_attn_processor(AttnProcessor())
    schedule = VariancePreserving(embedded.build_scheduler().alphas_cumprod)
    return NetworkDenoiser(unet.eval().requires_grad_(False), schedule, (2, 4, 4))


def small_inputs(settings: Settings) -> tuple[GradientComputer, torch.Tensor, list[Condition]]:
    """A row maker on `small_denoiser`, a latent and three conditions."""
    denoiser = small_denoiser()
    count = PerSampleVjp(denoiser.network, settings.layer).input_dim
    projection = make_projection("random_mask", count, 16, 0)
    maker = GradientComputer(denoiser, projection, settings.layer, settings.normalize)
    return maker, torch.randn(1, 2, 4, 4), Condition(torch.randn(3, 3, 8)).split()


def count_train(settings: Settings) -> int:
    """FE of one train image under the settings."""
    maker, x0, (cond, cond_null, _) = small_inputs(settings)
    counter, denoiser = ForwardCounter(), maker.denoiser
    with counter.counting(denoiser.network):
        train_gradients(
            maker, settings.f, TrainBatch(x0, cond, cond_null, train_timesteps(settings))
        )
    return counter.total


def count_query(settings: Settings) -> int:
    """FE of the query gradient of one concept under the settings."""
    s, (maker, x, (cond, minus, null)) = settings, small_inputs(settings)
    counter, denoiser = ForwardCounter(), maker.denoiser
    with counter.counting(denoiser.network):
        read = query_states_of(
            denoiser, query_timesteps(s), QueryStart(x, x), cond, null, s.batch_size
        )
        contrasted = (x.contrasting(cond, minus) for x in rebatch(read, s.batch_size))
        maker.mean_row(contrasted, concept_cotangent(s.f))
    return counter.total


def count_literal() -> int:
    """FE of one train image in the published code, computed literally.

    Gradients by vmap count one forward and one backward a state.
    """
    denoiser, counter = small_denoiser(), ForwardCounter()
    cond, cond_null = Condition(torch.randn(2, 3, 8)).split()
    x0, recipe = (
        torch.randn(1, 2, 4, 4),
        ReferenceImplementation(denoiser, cond_null, "attn2", 16, 0),
    )
    with counter.counting(denoiser.network):
        states = recipe.invert(x0, cond, 7.5)
        for t, x_t in states:
            recipe.dps_guidance(x_t, t, x0, cond)
    return counter.total + 2 * len(states)
