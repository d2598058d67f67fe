"""Stand-ins for Stable Diffusion and the AbC release: the real classes, file names and array
layouts, at a size for two cores.

Pipeline: CLIP text model of width 768 and 77 tokens, latents 4 x 8 x 8, pictures 64 x 64, attn2
layers in down, up and mid blocks. Release: 40 LAION rows (mirrored latents after them), two models
with exemplars, prompts, a token for each.
"""

import json

import numpy as np
import torch
from PIL import Image

ROWS, LATENT = 40, (4, 8, 8)
MODELS = {
    "test_artchive": ("artchive", "african", None, 3),
    "test_bamfg": ("bamfg", "101549_0", None, 2),
}


def save_sd_standin(folder, seed=0, prediction="epsilon"):
    """A pipeline folder of SD 1.x's shape with random weights (about two million parameters, most
    of them token embeddings).
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from experiments.emoji.model import pipeline as embedded

    torch.manual_seed(seed)
    tokenizer = embedded.build_tokenizer(
        [f"a {w} in the style of art picture" for w in ("cat", "dog", "tree", "sun")]
    )
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=768,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=768,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=10.0,
        )
    )  # or captions would hardly differ
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    pipe = embedded.build_pipeline(vae, text_encoder, tokenizer, unet)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    embedded.save_pipeline(pipe, folder)
    return folder


def picture(rng, path):
    """A random 64 x 64 JPEG of a few flat shapes."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    for _ in range(4):
        a, b = sorted(rng.integers(0, 64, 2)), sorted(rng.integers(0, 64, 2))
        pixels[a[0] : a[1] + 1, b[0] : b[1] + 1] = rng.integers(0, 256, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def save_release(root, seed=0):
    """The release's layout under `root` (`concept_trak.datasets.encoded`, `.abc`)."""
    rng = np.random.default_rng(seed)
    for i in range(ROWS):
        picture(rng, root / f"laion_subset/images/{i:08d}.jpg")
    (root / "laion_subset/captions.txt").write_text(
        "".join(f"a {('cat', 'dog', 'tree')[i % 3]} number {i}\n" for i in range(ROWS))
    )
    latents = rng.standard_normal((ROWS, *LATENT)).astype(np.float16)
    np.save(root / "laion_latents.npy", np.concatenate([latents, latents[..., ::-1]]))
    np.save(
        root / "laion_text_embeddings.npy", rng.standard_normal((ROWS, 77, 768)).astype(np.float16)
    )
    prompts = {}
    (root / "json").mkdir()
    for case, (group, model, category, count) in MODELS.items():
        paths = [f"dataset/exemplar/{group}/images/{model}-{i}.jpg" for i in range(count)]
        for path in paths:
            picture(rng, root / path.removeprefix("dataset/"))
        synth = {
            kind: [f"dataset/synth/{group}/{kind}/{model}/samples/{i:05d}.png" for i in range(4)]
            for kind in ("gpt", "object")
        }
        prompts |= {
            p: f"A {('cat', 'tree')['object' in p]} in the style of <new1> art"
            for ps in synth.values()
            for p in ps
        }
        (root / f"json/{case}.json").write_text(
            json.dumps(
                [{"exemplar": paths, "synth": synth, "class_id": model, "category": category}]
            )
        )
        (root / f"models/{group}/{model}").mkdir(parents=True)
        torch.save(
            {"<new1>": torch.from_numpy(rng.standard_normal(768).astype(np.float32))},
            root / f"models/{group}/{model}/<new1>.bin",
        )
    (root / "json/path_to_prompts.json").write_text(json.dumps(prompts))
    return root
