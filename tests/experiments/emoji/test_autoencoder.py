"""The autoencoder's losses against slow ways to the same numbers; its training, killed or not."""

import dataclasses
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from torch.distributions import Normal, kl_divergence

from concept_trak.errors import UserError
from experiments.emoji.model import autoencoder
from experiments.emoji.model.autoencoder import (
    AutoencoderSettings,
    decoder_loss,
    jitter,
    picture_loss,
    refine_decoder,
    train_vae,
    vae_loss,
)
from experiments.training.loop import LrPhase, load_checkpoint

SHORT = (LrPhase(7, 7),)
QUICK = AutoencoderSettings(vae_phases=SHORT, vae_batch=3, decoder_phases=SHORT, decoder_batch=3)


def build_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    )


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return build_vae()


def train_small(patch):
    """Trainings build a small autoencoder and save it every third step."""
    patch.setattr(autoencoder.embedded, "build_vae", build_vae)
    patch.setitem(autoencoder.LOOP, "save_every", 3)


@pytest.fixture
def small(monkeypatch):
    train_small(monkeypatch)


def pictures(n=6, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def slow_picture_loss(recon, images, edge_weight):
    """The loss of the docstring, pixel by pixel."""
    error = (recon - images).double()
    n, _, height, width = error.shape
    chroma, across, down = [], [], []
    for i in range(n):
        for y in range(height):
            for x in range(width):
                pixel = error[i, :, y, x]
                chroma += [(value - pixel.sum() / 3) ** 2 for value in pixel]
                across += (error[i, :, y, x + 1] - pixel).abs().tolist() if x + 1 < width else []
                down += (error[i, :, y + 1, x] - pixel).abs().tolist() if y + 1 < height else []
    edges = sum(across) / len(across) + sum(down) / len(down)
    return error.abs().mean() + 10 * sum(chroma) / len(chroma) + edge_weight * edges


def test_the_picture_loss_is_that_of_a_loop_over_the_pixels():
    recon, images = pictures(2, 1)[..., :6], pictures(2, 2)[..., :6]
    want = slow_picture_loss(recon, images, 0.7).float()
    torch.testing.assert_close(picture_loss(recon, images, 0.7), want)
    assert picture_loss(images, images, 0.7) == 0


def test_the_vae_loss_is_the_picture_loss_of_a_sample_and_its_divergence(vae):
    images, settings = pictures(), dataclasses.replace(QUICK, kl_weight=0.3)
    g = torch.Generator().manual_seed(5)
    posterior = vae.encode(images).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
    q = Normal(posterior.mean, posterior.std)
    kl = kl_divergence(q, Normal(torch.zeros(()), torch.ones(()))).mean()
    want = slow_picture_loss(vae.decode(z).sample, images, QUICK.edge_weight) + 0.3 * kl
    got = vae_loss(vae, images, torch.Generator().manual_seed(5), settings)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=0)


def test_the_decoders_loss_is_at_the_noised_mean_and_leaves_the_encoder_alone(vae):
    images, settings = pictures(), dataclasses.replace(QUICK, decoder_noise=0.5)
    mean = vae.encode(images).latent_dist.mean
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    recon = vae.decode(mean + 0.5 / vae.config.scaling_factor * noise).sample
    got = decoder_loss(vae, images, torch.Generator().manual_seed(5), settings)
    want = slow_picture_loss(recon, images, QUICK.edge_weight).float()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    got.backward()
    assert all(p.grad is None for p in vae.encoder.parameters())


def test_jitter_brings_in_white_keeps_size_and_is_nothing_at_zero():
    white, g = torch.ones(4, 3, 8, 8), torch.Generator().manual_seed(0)
    torch.testing.assert_close(jitter(white, g, 0.2, 0.3, 0.5), white)
    torch.testing.assert_close(jitter(pictures(), g, 0.0, 0.0), pictures())
    torch.testing.assert_close(jitter(pictures(), g, 0.0, 0.0, 1.0), pictures().flip(-1))


def trained(folder):
    """The autoencoder after both trainings in a folder."""
    folder.mkdir(exist_ok=True)
    vae = train_vae(pictures(), QUICK, folder)
    refine_decoder(vae, pictures(), QUICK, folder)
    return vae


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the autoencoder, its folder) of trainings that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        train_small(patch)
        return trained(folder), folder


@pytest.mark.parametrize("loss", ["vae_loss", "decoder_loss"])
def test_a_killed_training_ends_with_the_same_weights(loss, whole, small, tmp_path, monkeypatch):
    (whole, at), calls, real = whole, [], getattr(autoencoder, loss)

    def dying(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, loss, dying)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed")
    again = trained(tmp_path / "killed")
    assert again.config.scaling_factor == whole.config.scaling_factor
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("vae", "decoder"):
        paths = (folder / f"{name}.safetensors" for folder in (at, tmp_path / "killed"))
        (one, state), (two, end) = map(load_checkpoint, paths)
        assert state == end and all(torch.equal(one[k], two[k]) for k in one)


def test_refining_changes_the_decoder_only_and_latents_have_unit_variance(small, tmp_path):
    vae = train_vae(pictures(), QUICK, tmp_path)
    before = {k: p.clone() for k, p in vae.named_parameters()}
    latents = vae.encode(pictures()).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(latents.std(), torch.ones(()))
    refine_decoder(vae, pictures(), QUICK, tmp_path)
    changed = {k for k, p in vae.named_parameters() if not torch.equal(p, before[k])}
    assert changed and all(k.startswith(("decoder.", "post_quant_conv.")) for k in changed)
    assert not any(p.requires_grad for p in vae.parameters())


def test_a_checkpoint_of_other_pictures_settings_or_encoder_is_refused(small, whole, tmp_path):
    vae = whole[0]
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    other = dataclasses.replace(QUICK, kl_weight=1.0)
    for inputs, words in (((pictures(seed=9), QUICK), "pictures"), ((pictures(), other), "kl_w")):
        with pytest.raises(UserError, match=f"vae.safetensors was made from another {words}"):
            train_vae(*inputs, tmp_path)
    later = dataclasses.replace(QUICK, decoder_lr=1.0)  # of what comes after the autoencoder
    assert torch.equal(
        train_vae(pictures(), later, tmp_path).encoder.conv_in.weight, vae.encoder.conv_in.weight
    )
    with pytest.raises(UserError, match="decoder.safetensors was made from another vae"):
        refine_decoder(build_vae(), pictures(), QUICK, tmp_path)
