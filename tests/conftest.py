"""Small models that every test can share; one thread, so that several test runs do not fight over
the cores.
"""

import errno
import json
import shutil

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

OBJECTS, STYLES = ("cat", "dog", "tree"), ("blob", "line", "flat", "soft")


class GaussianDenoiser:
    """The exact eps of data ~ N(mean, variance I): an oracle for samplers and inversions.

    x_t ~ N(alpha mean, (alpha^2 variance + sigma^2) I), and eps = -sigma * score.
    """

    def __init__(self, mean=0.3, variance=0.25, shape=(2, 4, 4), schedule=None):
        from concept_trak.models.schedule import VariancePreserving
        from experiments.emoji.model.pipeline import build_scheduler

        self.schedule = schedule or VariancePreserving(build_scheduler().alphas_cumprod)
        self.latent_shape, self.mean, self.variance = shape, mean, variance

    def eps(self, x_t, t, cond):
        alpha, sigma = self.schedule.level(t)
        told = 0.0 if cond is None else cond.embeddings.flatten(1).mean(1).view(-1, 1, 1, 1)
        spread = alpha**2 * self.variance + sigma**2
        return sigma * (x_t - alpha * (self.mean + told)) / spread


@pytest.fixture
def gaussian():
    return GaussianDenoiser()


def tiny_unet(seed=0):
    """A UNet2DConditionModel of some ten thousand parameters with attn2 layers, plain attention
    (vmap has no rule for SDPA).
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    if seed is not None:
        torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet.eval()


@pytest.fixture
def tiny_denoiser():
    from concept_trak.models.denoiser import NetworkDenoiser
    from concept_trak.models.schedule import VariancePreserving
    from experiments.emoji.model.pipeline import build_scheduler

    schedule = VariancePreserving(build_scheduler().alphas_cumprod)
    return NetworkDenoiser(tiny_unet(), schedule, (2, 4, 4))


def save_tiny_pipeline(folder, seed=0, objects=OBJECTS, styles=STYLES):
    """A whole pipeline folder (8x8 pictures, 4x4 latents) with random weights, made of the embedded
    model's parts.
    """
    from concept_trak.datasets.labels import caption
    from experiments.emoji.model import pipeline as embedded

    tokenizer = embedded.build_tokenizer([caption(f"a {o}", s) for o in objects for s in styles])
    unet = tiny_unet(seed)
    text_encoder, vae = tiny_text_encoder(tokenizer), tiny_vae()
    embedded.save_pipeline(embedded.build_pipeline(vae, text_encoder, tokenizer, unet), folder)
    return folder


GONE = object()  # in place of a value: the key is not there


def changed(source, folder, file, **values):
    """A copy of a pipeline folder with other values in one of its JSON files."""
    shutil.copytree(source, folder)
    path = folder / file
    content = json.loads(path.read_text()) | values
    path.unlink()
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not GONE}))
    return folder


def tiny_text_encoder(tokenizer):
    """A CLIPTextModel of width 6."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from experiments.emoji.model import pipeline as embedded

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=6,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=6,
            max_position_embeddings=embedded.MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=30.0,
        )
    )  # or captions would hardly differ


def tiny_vae():
    """8x8x3 pictures <-> 4x4x2 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    )


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="session")
def other_pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "other", seed=1)


def save_tiny_data(root, objects=OBJECTS, styles=STYLES):
    """Labelled 8x8 pictures, object x style, twelve of them; the first cell is held out."""
    from PIL import Image

    root.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for name, style in [(o, s) for o in objects for s in styles]:
        file_name = f"{style}-{name}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / file_name)
        rows.append(
            {
                "file_name": file_name,
                "text": f"a {name} in the style of {style}",
                "object": name,
                "object_phrase": f"a {name}",
                "style": style,
                "style_phrase": style,
                "split": "held_out" if (name, style) == (objects[0], styles[0]) else "train",
            }
        )
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return save_tiny_data(tmp_path_factory.mktemp("data"))


def small_run(pipeline, data, base):
    """{name: value} of settings with which rows and answers take a second, below `base`."""
    places = {"sd_model_path": pipeline, "data_dir": data}
    places |= {"grad_dir": base / "grads", "results_dir": base / "results"}
    sizes = {"proj_dim": 32, "num_split": 3, "nfe": 3, "gen_num_inference_steps": 4, "epochs": 2}
    sizes |= {"batch_size": 4, "top_k": 3, "device": "cpu"}  # a batch a shard
    return places | sizes


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline):
    from concept_trak.models.text_to_image import load_pipeline

    return load_pipeline(str(tiny_pipeline))


@pytest.fixture
def full_disk(monkeypatch):
    """No byte reaches the disk any more: what is written is refused when it is synced."""

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("concept_trak.atomic_io.os.fsync", full)


def in_this_process(bench, plan, work):
    """In place of `truth.train_many.retrain`: every model of a plan, one after another, here."""
    for subset in plan.subsets:
        work.make(bench, plan, subset)
