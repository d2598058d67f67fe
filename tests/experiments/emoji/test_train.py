"""Training the embedded UNet: which batches it sees, what it loses, and a run that is killed."""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_unet
from torch import nn

from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import load_pipeline
from experiments.emoji.model import train
from experiments.emoji.model.train import Examples, TrainSettings, draw_batch, unet_loss
from experiments.training.loop import LrPhase, Run, load_checkpoint, step_generator

QUICK = TrainSettings(unet_phases=(LrPhase(5, 5, max_weight=4.0),), unet_batch=4, jitters=2)


class TextEncoder(nn.Module):
    """Token ids [B, T] -> embeddings [B, T, 6], as a CLIPTextModel gives them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 6)

    def forward(self, ids):
        return type("Out", (), {"last_hidden_state": self.table(ids)})


def examples(n=10, versions=3):
    """Latents that name picture and version, captions that name their kind."""
    latents = torch.randn(n, versions, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Examples(latents, torch.arange(4).view(1, 4, 1).expand(n, 4, 5))


def kinds_of(ids):
    return torch.bincount(ids[:, 0], minlength=4) / len(ids)


def test_captions_are_cut_and_dropped_as_often_as_the_settings_say():
    settings = dataclasses.replace(
        QUICK, unet_batch=40_000, object_only=0.2, style_only=0.1, cond_drop=0.05
    )
    _, ids, _ = draw_batch(examples(), settings, torch.Generator().manual_seed(1))
    want = torch.tensor([0.65, 0.2, 0.1, 0.05])
    torch.testing.assert_close(kinds_of(ids), want, rtol=0, atol=0.01)


def test_a_batch_covers_all_noise_levels_evenly_and_jitters_its_share():
    seen, settings = examples(), dataclasses.replace(QUICK, unet_batch=1000, jitter_share=0.3)
    x0, _, t = draw_batch(seen, settings, torch.Generator().manual_seed(1))
    assert t.tolist() == list(range(1000))
    plain = {tuple(x.flatten().tolist()) for x in seen.latents[:, 0]}
    share = sum(tuple(x.flatten().tolist()) in plain for x in x0) / 1000
    assert abs(share - 0.7) < 0.05


def test_a_batch_depends_on_seed_and_step_only():
    one, again, other = (
        draw_batch(examples(), QUICK, step_generator(3, step)) for step in (5, 5, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_the_loss_is_the_weighted_error_of_the_noise():
    """Computed sample by sample; the weight 1 / abar is bounded by the phase."""
    unet, text, seen, step = tiny_unet(), TextEncoder(), examples(), 2
    g = step_generator(QUICK.seed + 2, step)
    x0, ids, t = draw_batch(seen, QUICK, g)
    noise, errors, weights = torch.randn(x0.shape, generator=g), [], []
    with torch.no_grad():
        for i in range(len(x0)):
            a = train.ALPHA_BAR[t[i]].item()
            x_t = a**0.5 * x0[i] + (1 - a) ** 0.5 * noise[i]
            told = text(ids[i : i + 1]).last_hidden_state
            said = unet(x_t[None], t[i : i + 1], told).sample[0]
            weights.append(min(1 / a, 4.0))
            errors.append(weights[-1] * (said - noise[i]).square().mean())
        got = unet_loss(unet, text, seen, QUICK, step)
    torch.testing.assert_close(got, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
    assert min(weights) < 1.5 and max(weights) == 4.0


def parts():
    torch.manual_seed(0)
    return tiny_unet(), TextEncoder()


def test_a_killed_training_of_the_unet_ends_with_the_same_weights(tmp_path, monkeypatch):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    settings = dataclasses.replace(QUICK, unet_phases=(LrPhase(6, 6),))
    often = {"save_every": 3}
    monkeypatch.setattr(train, "Run", lambda *args, **options: Run(*args, **options | often))
    unet, text = parts()
    train.train_unet(unet, text, examples(), settings, tmp_path / "whole")
    loss = train.unet_loss

    def dying(*args):
        if args[-1] == 4:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "unet_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            train.train_unet(*parts(), examples(), settings, tmp_path / "killed")
    again, text_again = parts()
    train.train_unet(again, text_again, examples(), settings, tmp_path / "killed")
    for one, two in ((unet, again), (text, text_again)):
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    kept = [load_checkpoint(tmp_path / f / "unet.safetensors")[0] for f in ("whole", "killed")]
    assert all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0])


def test_after_training_the_averaged_weights_are_in_the_networks(tmp_path):
    unet, text = parts()
    train.train_unet(unet, text, examples(), QUICK, tmp_path)
    tensors, _ = load_checkpoint(tmp_path / "unet.safetensors")
    name, p = next(iter(unet.named_parameters()))
    assert torch.equal(p, tensors[f"ema/unet.{name}"])
    assert not torch.equal(tensors[f"ema/unet.{name}"], tensors[f"param/unet.{name}"])


def test_a_checkpoint_of_other_captions_or_another_encoder_is_refused(tmp_path):
    seen = examples()
    train.train_unet(*parts(), seen, QUICK, tmp_path, "encoder")
    other = Examples(seen.latents, seen.tokens.flip(1))
    for inputs, encoder, words in ((other, "encoder", "captions"), (seen, "new", "encoder")):
        with pytest.raises(UserError, match=f"unet.safetensors was made from another {words}"):
            train.train_unet(*parts(), inputs, QUICK, tmp_path, encoder)


def test_a_pipeline_is_trained_in_one_call_and_a_second_call_changes_nothing(tmp_path, tiny_data):
    phases, work, folder = (LrPhase(2, 2),), tmp_path / "work", tmp_path / "pipeline"
    short = {f"{part}_phases": phases for part in ("vae", "decoder", "unet")}
    settings = TrainSettings(**short, vae_batch=2, decoder_batch=2, unet_batch=2, jitters=1)
    models = []
    for _ in range(2):
        train.train(load_folder(tiny_data), folder, work, settings)
        models.append(load_pipeline(str(folder)))
    assert models[0].weight_hash() == models[1].weight_hash()
    assert models[0].latent_shape == (16, 8, 8)
    facts = json.loads((folder / "training.json").read_text())
    assert facts["steps"] == 2 and set(facts["curves"]) == {"vae", "decoder", "unet"}
    assert facts["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
