"""`concept-trak bench-sd14`: the engine on the true architecture of Stable Diffusion v1.4, with
random weights made on the spot.

Measured: seconds of a forward pass, of a train state (DPS) and of a query state (slider) with unit
norm and projection, and the peak memory. Counted: forward-equivalents (FE; a backward pass to the
activations counts as one forward) an image of each recipe, by running the recipe on a network of a
few thousand parameters: the count does not depend on the size. From the two and the FLOP of a
forward pass follows a table of GPU-hours, which is computed, not measured.
"""

from __future__ import annotations

import contextlib
import json
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...attribution.train_grad import train_states
from ...models.text_to_image import DTYPES, Denoiser, TextToImage
from ...rows import featurize, query
from ...rows.projection import make_projection
from ...rows.vjp import PerSampleVjp
from ...settings import Settings, as_dict, provenance, resolve
from ...workshop.embedded import pipeline as embedded
from . import literal_reference
from .scoring import peak_rss_gib

ATTN2_COORDINATES, PARAMETERS = 43_962_560, 859_520_964
SUSTAINED_TFLOPS = {"A100, 125 TFLOP/s": 125.0, "H100, 300 TFLOP/s": 300.0}  # assumed, not measured
IMAGES = 100_000


def build_unet():
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
    """FLOP of a forward pass for one image, without computing it; with plain attention, whose
    products the counter knows.
    """
    from diffusers.models.attention_processor import AttnProcessor

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        unet = build_unet()
        unet.set_attn_processor(AttnProcessor())
        unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    return counted.get_total_flops()


def build_sd14(device: str, dtype: str) -> TextToImage:
    """SD v1.4's UNet, VAE and CLIP text model with random weights; the tokenizer knows a few words
    only.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = embedded.build_tokenizer(["a picture in the style of art"])
    tokenizer.model_max_length = 77
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            projection_dim=768,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    pipe = embedded.build_pipeline(vae, text, tokenizer, build_unet()).to(device, DTYPES[dtype])
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    return TextToImage(pipe, "Stable Diffusion v1.4, random weights")


class Counter:
    """Counts samples that pass forward through a network, and backward through its output."""

    def __init__(self):
        self.forward = self.backward = 0

    @contextlib.contextmanager
    def counting(self, network: torch.nn.Module):
        """Count while the context is open: its forward hook, and `torch.autograd.grad` replaced by
        one that counts and calls it.
        """
        backward = torch.autograd.grad

        def counted(outputs, inputs, *args, **kwargs):
            self.backward += len(
                outputs if outputs.dim() else inputs
            )  # a scalar was summed over the batch
            return backward(outputs, inputs, *args, **kwargs)

        handle = network.register_forward_hook(
            lambda module, args, output: setattr(self, "forward", self.forward + len(args[0]))
        )
        torch.autograd.grad = counted
        try:
            yield self
        finally:
            torch.autograd.grad = backward
            handle.remove()

    @property
    def total(self) -> int:
        """Forward-equivalents."""
        return self.forward + self.backward


def small_denoiser() -> Denoiser:
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
    return Denoiser(
        unet.eval().requires_grad_(False), embedded.build_scheduler().alphas_cumprod, (2, 4, 4)
    )


def count_train(settings: Settings) -> int:
    """FE of one train image under the settings."""
    denoiser, counter = small_denoiser(), Counter()
    count = PerSampleVjp(denoiser.network, settings.layer).input_dim
    x0, cond = torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 8)
    with counter.counting(denoiser.network):
        featurize.featurize(
            denoiser,
            make_projection("random_mask", count, 16, 0),
            x0,
            *cond,
            layer=settings.layer,
            objective=settings.f,
            states=train_states(settings),
            normalize=settings.normalize,
        )
    return counter.total


def count_query(settings: Settings) -> int:
    """FE of the query gradient of one concept under the settings."""
    from ...attribution.attribute import query_states

    denoiser, counter = small_denoiser(), Counter()
    count = PerSampleVjp(denoiser.network, settings.layer).input_dim
    x, cond = torch.randn(1, 2, 4, 4), torch.randn(3, 1, 3, 8)
    with counter.counting(denoiser.network):
        read = query.read_states(
            denoiser,
            query_states(settings),
            cond[0],
            cond[2],
            x_T=x,
            x0=x,
            batch_size=settings.batch_size,
        )
        query.concept_gradient(
            denoiser,
            make_projection("random_mask", count, 16, 0),
            read,
            cond[0],
            cond[1],
            layer=settings.layer,
            normalize=True,
            two_sided=settings.two_sided,
        )
    return counter.total


def count_literal() -> int:
    """FE of one train image in the published code, computed literally; gradients by vmap count one
    forward and one backward a state.
    """
    denoiser, counter = small_denoiser(), Counter()
    x0, cond = torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 8)
    with counter.counting(denoiser.network):
        states = literal_reference.invert(denoiser, x0, *cond, 7.5)
        for t, x_t in states:
            literal_reference.dps_guidance(denoiser, x_t, t, x0, cond[0])
    return counter.total + 2 * len(states)


def gpu_hours(fe: int, flop: float) -> dict[str, float]:
    """Hours for IMAGES train rows on one GPU at the assumed sustained speeds."""
    return {
        name: round(fe * flop * IMAGES / (speed * 1e12) / 3600, 1)
        for name, speed in SUSTAINED_TFLOPS.items()
    }


def timed(work) -> tuple[float, object]:
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(model: TextToImage, settings: Settings) -> dict:
    """Seconds of a forward pass, a train state and a query state at one noise level; FLOP of a
    forward pass.
    """
    tape = PerSampleVjp(model.network, settings.layer)
    projection = make_projection(
        "random_mask", tape.input_dim, settings.proj_dim, 0, str(model.device)
    )
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, *model.latent_shape, generator=g).to(model.device, model.dtype)
    cond, cond_null = model.encode_prompts(["a picture in the style of art", ""]).split(1)
    with torch.no_grad():
        forward, _ = timed(lambda: model.eps(x0, 500, cond))
    one_state = featurize.noised_states(2)
    train, (row, _) = timed(
        lambda: featurize.featurize(
            model,
            projection,
            x0,
            cond,
            cond_null,
            layer=settings.layer,
            objective="dps",
            states=one_state,
            normalize=True,
        )
    )
    asked, q = timed(
        lambda: query.concept_gradient(
            model,
            projection,
            [(500, x0, None)],
            cond,
            cond_null,
            layer=settings.layer,
            normalize=True,
        )
    )
    if not (row.isfinite().all() and q.isfinite().all() and float(row.norm()) > 0):
        raise FloatingPointError("a gradient of the random network is zero or not finite")
    return {
        "coordinates": tape.input_dim,
        "flop_per_forward": count_flop(),
        "seconds": {"forward": forward, "train_state_dps": train, "query_state": asked},
    }


def bench_sd14(settings: Settings, device: str) -> dict:
    """Print the tables; the last line is one JSON object."""
    s = settings
    print(
        "building Stable Diffusion v1.4 with random weights: 4.3 GB in fp32, and 3 GB of working "
        "memory",
        flush=True,
    )
    model = build_sd14(device, s.dtype)
    parameters = sum(p.numel() for p in model.network.parameters())
    found = measure(model, s)
    if (parameters, found["coordinates"]) != (PARAMETERS, ATTN2_COORDINATES) and s.layer == "attn2":
        raise AssertionError(
            f"{parameters} parameters, {found['coordinates']} attn2 coordinates: not the "
            "architecture of SD v1.4"
        )
    own_grid = resolve("abc", {"recipe": "default", "ddim_inversion": True, "f": "dps"})
    recipes = {
        "reference": resolve("abc", {}),
        "own grid of 9 states, DPS": own_grid,
        "own data (default)": resolve("own", {}),
    }
    fe = {
        "published code": count_literal(),
        **{name: count_train(r) for name, r in recipes.items()},
    }
    result = {
        "parameters": parameters,
        **found,
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": s.dtype,
        "peak_gib": peak_rss_gib(),
        "fe_per_train_image": fe,
        "fe_per_query": {name: count_query(r) for name, r in recipes.items()},
        "gpu_hours_computed": {
            name: gpu_hours(n, found["flop_per_forward"]) for name, n in fe.items()
        },
    }
    print(table(result))
    print(json.dumps({**result, "settings": as_dict(s), "provenance": provenance()}))
    return result


def table(result: dict) -> str:
    """Markdown: what was measured, then what was counted and computed."""
    seconds = result["seconds"]
    lines = [
        f"{result['parameters']:,} parameters, {result['coordinates']:,} selected coordinates, "
        f"{result['flop_per_forward'] / 1e12:.2f} TFLOP a "
        f"forward pass; peak {result['peak_gib']:.1f} GiB",
        "",
        "| measured, one image | seconds | forwards |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {value:.1f} | {value / seconds['forward']:.1f} |"
        for name, value in seconds.items()
    ]
    lines += [
        "",
        f"| counted, a train image | FE | hours for {IMAGES:,} images, computed: "
        f"{' / '.join(SUSTAINED_TFLOPS)} |",
        "|---|---|---|",
    ]
    hours = {
        name: " / ".join(map(str, of.values())) for name, of in result["gpu_hours_computed"].items()
    }
    lines += [
        f"| {name} | {n} | {hours[name]} |" for name, n in result["fe_per_train_image"].items()
    ]
    lines += ["", "| counted, a query gradient | FE |", "|---|---|"]
    return (
        "\n".join(lines + [f"| {name} | {n} |" for name, n in result["fe_per_query"].items()])
        + "\n"
    )
