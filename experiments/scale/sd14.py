"""`concept-trak bench-sd14`: the engine on the true architecture of Stable Diffusion v1.4, with
random weights made on the spot.

Measured: seconds of a forward pass, of a train state (DPS) and of a query state (slider) with unit
norm and projection, and the peak memory. Counted: forward-equivalents of each recipe, see `cost`.
From the two and the FLOP of a forward pass follows a table of GPU-hours, which is computed, not
measured.
"""

from __future__ import annotations

import json

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from concept_trak.gradients.compute import GradientComputer
from concept_trak.gradients.objectives import presence
from concept_trak.gradients.projection import make_projection
from concept_trak.gradients.state import State
from concept_trak.gradients.states import noising_schedule, train_states_of
from concept_trak.gradients.vjp import PerSampleVjp
from concept_trak.models.text_to_image import DTYPES, TextToImage
from concept_trak.registry import OBJECTIVES
from concept_trak.settings import Settings, as_dict, provenance, resolve
from experiments.emoji.model import pipeline as embedded

from .cost import count_literal, count_query, count_train
from .timing import peak_rss_gib, timed

ATTN2_COORDINATES, PARAMETERS = 43_962_560, 859_520_964
SUSTAINED_TFLOPS = {"A100, 125 TFLOP/s": 125.0, "H100, 300 TFLOP/s": 300.0}  # assumed, not measured
IMAGES = 100_000


def build_unet() -> nn.Module:
    """SD v1.4's UNet with random weights."""
    from diffusers import UNet2DConditionModel

    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=down,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def count_flop() -> int:
    """FLOP of a forward pass for one image, without computing it.

    With plain attention, whose products the counter knows.
    """
    from diffusers.models.attention_processor import AttnProcessor

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        unet = build_unet()
        unet.set_attn_processor(AttnProcessor())
        unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    return counted.get_total_flops()


def build_sd14(device: str, dtype: str) -> TextToImage:
    """SD v1.4's UNet, VAE and CLIP text model with random weights; a tokenizer of a few words."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = embedded.build_tokenizer(["a picture in the style of art"])
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        projection_dim=768,
        eos_token_id=tokenizer.eos_token_id,
    )
    text_encoder = CLIPTextModel(text)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    pipe = embedded.build_pipeline(vae, text_encoder, tokenizer, build_unet())
    pipe = pipe.to(device, DTYPES[dtype])
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    return TextToImage(pipe, "Stable Diffusion v1.4, random weights")


def gpu_hours(fe: int, flop: float) -> dict[str, float]:
    """Hours for IMAGES train rows on one GPU at the assumed sustained speeds."""
    return {
        name: round(fe * flop * IMAGES / (speed * 1e12) / 3600, 1)
        for name, speed in SUSTAINED_TFLOPS.items()
    }


def measure(model: TextToImage, settings: Settings) -> dict:
    """Seconds of a forward pass, a train state and a query state; FLOP of a forward pass."""
    count = PerSampleVjp(model.network, settings.layer).input_dim
    projection = make_projection("random_mask", count, settings.proj_dim, 0, str(model.device))
    maker = GradientComputer(model, projection, settings.layer, True)
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, *model.latent_shape, generator=g).to(model.device, model.dtype)
    cond, cond_null = model.encode_prompts(["a picture in the style of art", ""]).split()
    with torch.no_grad():
        forward, _ = timed(lambda: model.eps(x0, 500, cond))
    states = train_states_of(model, x0, cond, cond_null, noising_schedule(2))
    train, (row, *_) = timed(lambda: maker.rows(states, OBJECTIVES.get("dps").cotangent, 1))
    asked, q = timed(lambda: maker.mean_row([State(500, x0, cond, cond_null)], presence))
    if not (row.isfinite().all() and q.isfinite().all() and float(row.norm()) > 0):
        raise FloatingPointError("a gradient of the random network is zero or not finite")
    return {
        "coordinates": count,
        "flop_per_forward": count_flop(),
        "seconds": {"forward": forward, "train_state_dps": train, "query_state": asked},
    }


def bench_sd14(settings: Settings, device: str) -> dict:
    """Print the tables; the last line is one JSON object."""
    s, weights = settings, "4.3 GB in fp32, and 3 GB of working memory"
    print(f"building Stable Diffusion v1.4 with random weights: {weights}", flush=True)
    model = build_sd14(device, s.dtype)
    parameters = sum(p.numel() for p in model.network.parameters())
    found = measure(model, s)
    sizes = parameters, found["coordinates"]
    if sizes != (PARAMETERS, ATTN2_COORDINATES) and s.layer == "attn2":
        what = "{} parameters, {} attn2 coordinates".format(*sizes)
        raise AssertionError(f"{what}: not the architecture of SD v1.4")
    recipes = {
        "reference": resolve("abc", {}),
        "own grid of 9 states, DPS": resolve(
            "abc", {"recipe": "default", "ddim_inversion": True, "f": "dps"}
        ),
        "own data (default)": resolve("own", {}),
    }
    fe = {"published code": count_literal()}
    fe |= {name: count_train(recipe) for name, recipe in recipes.items()}
    hours = {name: gpu_hours(n, found["flop_per_forward"]) for name, n in fe.items()}
    result = {
        "parameters": parameters,
        **found,
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": s.dtype,
        "peak_gib": peak_rss_gib(),
        "fe_per_train_image": fe,
        "fe_per_query": {name: count_query(recipe) for name, recipe in recipes.items()},
        "gpu_hours_computed": hours,
    }
    print(table(result))
    print(json.dumps({**result, "settings": as_dict(s), "provenance": provenance()}))
    return result


def table(result: dict) -> str:
    """Markdown: what was measured, then what was counted and computed."""
    seconds, hours = result["seconds"], result["gpu_hours_computed"]
    tera, speeds = result["flop_per_forward"] / 1e12, " / ".join(SUSTAINED_TFLOPS)
    lines = [
        f"{result['parameters']:,} parameters, {result['coordinates']:,} selected coordinates, "
        f"{tera:.2f} TFLOP a forward pass; peak {result['peak_gib']:.1f} GiB",
        "",
        "| measured, one image | seconds | forwards |",
        "|---|---|---|",
        *(f"| {name} | {s:.1f} | {s / seconds['forward']:.1f} |" for name, s in seconds.items()),
        "",
        f"| counted, a train image | FE | hours for {IMAGES:,} images, computed: {speeds} |",
        "|---|---|---|",
    ]
    for name, fe in result["fe_per_train_image"].items():
        lines.append(f"| {name} | {fe} | {' / '.join(map(str, hours[name].values()))} |")
    lines += ["", "| counted, a query gradient | FE |", "|---|---|"]
    lines += [f"| {name} | {fe} |" for name, fe in result["fe_per_query"].items()]
    return "\n".join(lines) + "\n"
