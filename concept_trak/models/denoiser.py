"""eps(x_t, t, cond): what every method differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from .condition import Condition
from .schedule import Schedule


class Denoiser(Protocol):
    """A network that predicts noise, with its schedule."""

    network: nn.Module
    schedule: Schedule
    latent_shape: tuple[int, ...]
    device: torch.device

    def eps(self, x_t: torch.Tensor, t: int | torch.Tensor, cond: Condition) -> torch.Tensor:
        """eps_hat [B, ...] at one timestep t, or one for each sample (t [B], on the CPU)."""
        ...


Call = Callable[[nn.Module, torch.Tensor, torch.Tensor, Condition], torch.Tensor]


def call_unet(
    network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, cond: Condition
) -> torch.Tensor:
    """A diffusers UNet2DConditionModel and what is called like it."""
    return network(x_t, t, encoder_hidden_states=cond.embeddings, **cond.extra).sample


class NetworkDenoiser:
    """A torch module as a `Denoiser`. call: how the module is asked, see `call_unet`."""

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        call: Call = call_unet,
    ) -> None:
        self.network, self.schedule, self.latent_shape = network, schedule, tuple(latent_shape)
        self._call = call
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def eps(self, x_t: torch.Tensor, t: int | torch.Tensor, cond: Condition) -> torch.Tensor:
        """See `Denoiser.eps`."""
        if isinstance(t, int):
            levels = torch.full((len(x_t),), t, device=x_t.device)
        else:
            levels = t.to(x_t.device)
        return self.schedule.to_eps(self.output(x_t, levels, cond), x_t, t)

    def output(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """The network's own prediction [B, ...]: eps, v or a velocity; t [B] on x_t's device."""
        return self._call(self.network, x_t, t, cond)
