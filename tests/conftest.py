"""Small models that every test can share; one thread, so that several test runs do not fight over the cores."""

import pytest
import torch

torch.set_num_threads(1)


class GaussianDenoiser:
    """The exact eps of data ~ N(mean, variance I): an oracle for samplers and inversions.

    x_t ~ N(sqrt(a) mean, (a variance + 1 - a) I), and eps = -sqrt(1 - a) * score.
    """

    def __init__(self, mean=0.3, variance=0.25, shape=(2, 4, 4)):
        from concept_trak.embedded import build_scheduler

        self.alpha_bar, self.latent_shape = build_scheduler().alphas_cumprod.double(), shape
        self.mean, self.variance = mean, variance

    def eps(self, x_t, t, cond):
        a = float(self.alpha_bar[t])
        shift = self.mean + (0.0 if cond is None else cond.flatten(1).mean(1).view(-1, 1, 1, 1))
        return (1 - a) ** 0.5 * (x_t - a**0.5 * shift) / (a * self.variance + 1 - a)


@pytest.fixture
def gaussian():
    return GaussianDenoiser()


def tiny_unet(seed=0):
    """A UNet2DConditionModel of some ten thousand parameters with attn2 layers, plain attention (vmap has no rule for SDPA)."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 8), layers_per_block=1,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                                cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4)
    unet.set_attn_processor(AttnProcessor())
    return unet.eval()


@pytest.fixture
def tiny_denoiser():
    from concept_trak.embedded import build_scheduler
    from concept_trak.models import Denoiser

    return Denoiser(tiny_unet(), build_scheduler().alphas_cumprod, (2, 4, 4))
