"""The one place for every default. A recipe or a benchmark only states where it departs; a script
only passes on what the user set.

resolve("emoji", {"prompt": "..."})  ->  Settings        fields < benchmark < recipe < what the user set
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DAMPINGS = tuple(
    0.1 * 10.0**e for e in range(-4, 5)
)  # relative to the mean eigenvalue of K; the reference's lambda_r x 0.1
TOKEN = "<new1>"  # the word that a token stands for in AbC and Custom Diffusion
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "traker",
    "dattri",
    "numpy",
    "pillow",
    "safetensors",
)


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; the environment variable of a field is its name in capitals."""

    # what is asked
    prompt: str = "Pikachu in the style of Pablo Picasso"
    target_concepts: str = (
        "Pikachu,Pablo Picasso"  # separated by "," or, when a concept holds commas, by "|"
    )
    negative_prompts: str = ""  # one for each target; empty: the prompt without the target
    negative_prompt: str = ""  # of the generation of the query picture
    seed: int = 0
    # where the query's states come from: seed (the query's own x_T), global (fresh x_T), local (its
    # picture)
    scope: str = "seed"
    # how rows are made
    recipe: str = "default"
    layer: str = "attn2"  # part of the parameter names, "|" between alternatives
    f: str = "contrast"  # train objective: contrast, presence, dps, dsm, dtrak, das
    nfe: int = 10  # nfe - 1 states, at noise levels evenly from 100 to 900
    ddim_inversion: bool = False
    normalize: bool = True  # unit norm for each state's gradient, in each of the blocks
    # what is unit-normed and preconditioned by itself: each module, or all parameters as one block
    blocks: str = "module"
    train_guidance_scale: float = 7.5  # of the inversion
    proj_type: str = "logra"
    proj_dim: int = 4096
    proj_seed: int = 0
    # of random_mask: portable, a GPU whose mask to rebuild, or auto: that of the store, portable
    # for a new one
    proj_mask: str = "auto"
    # the query
    # c+ and c-: slider (prompt, prompt without target), cfg (prompt, ""), concept (the target's
    # words, "")
    query_form: str = "slider"
    concept_guidance_scale: float = 1.0  # of the query's trajectories
    gen_guidance_scale: float = 7.5
    gen_num_inference_steps: int = 50
    eta: float = 0.1
    # draws: trajectories (scope seed, global) or noisings (scope local), each read at all states
    epochs: int = 8
    # scoring
    damping: float = 0.1  # the fixed one; one of DAMPINGS
    top_k: int = 10
    render_leastk: bool = False
    max_memory: str = "6GB"  # bound on the working memory of scoring
    # running
    sd_model_path: str = "CompVis/stable-diffusion-v1-4"
    lora_path: str = ""  # weights on top of the model
    data_dir: str = str(ROOT / "data/abc")
    source_dir: str = ""  # prepare: pictures and captions to encode into data_dir
    num_train: int = 0  # the first so many encoded pictures; 0: all
    grad_dir: str = str(ROOT / "experiments/abc/results/grads")
    results_dir: str = str(ROOT / "experiments/abc/results/qual")
    num_split: int = 16
    shards: str = ""  # "3,7-9"; empty: all
    batch_size: int = 16
    dtype: str = "auto"  # auto: fp16 on a GPU, fp32 on the CPU
    store_dtype: str = "float16"
    device: str = ""  # empty: GPU `gpu_id`, or the first GPU, or the CPU
    gpu_id: str = ""
    gpu_ids: str = ""  # train-grad: one process on each, e.g. "0 1 2 3"
    force_recompute_concept_grad: bool = False
    num_queries: int = 0  # evaluate: 0 is all
    methods: str = ""  # evaluate: "concept_trak,das"; empty: all
    # tasks of AbC
    task_idx: str = "0"  # "0", "0-47", "3,7-9"
    task_json: str = str(ROOT / "experiments/abc/configs/all_tasks.json")
    ti_model_path: str = (
        ""  # folder of the token's embedding; empty: where the release or run_ti.sh puts it
    )
    ti_weight_name: str = "new1.bin"

    def on(self, device: str) -> Settings:
        """The settings with DTYPE=auto decided for a device, "cpu" or "cuda:0"."""
        return (
            dataclasses.replace(self, dtype="fp32" if device == "cpu" else "fp16")
            if self.dtype == "auto"
            else self
        )

    @property
    def two_sided(self) -> bool:
        """Whether a query's c- is differentiated, too: as the train rows differentiate the empty
        prompt.
        """
        return self.f == "contrast"


CHOICES = {
    "scope": ("seed", "global", "local"),
    "f": ("contrast", "presence", "dps", "dsm", "dtrak", "das"),
    "blocks": ("module", "all"),
    "dtype": ("auto", "fp32", "fp16", "bf16"),
    "store_dtype": ("float16", "bfloat16", "float32"),
}
BOUNDS = {
    "nfe": (2, 500),
    "gen_num_inference_steps": (2, 999),
    "epochs": (1, None),
    "batch_size": (1, None),
    "proj_dim": (1, None),
    "top_k": (1, None),
    "num_split": (1, None),
    "eta": (0, 1),
    "seed": (0, 2**63 - 1),
    "num_queries": (0, None),
    "num_train": (0, None),
}
REFERENCE = {
    "f": "dps",
    "nfe": 10,
    "ddim_inversion": True,
    "normalize": True,
    "train_guidance_scale": 7.5,
    "proj_type": "random_mask",
    "eta": 0.1,
    "query_form": "slider",
    "scope": "seed",
    "blocks": "all",
}
RECIPES = {"default": {}, "reference": REFERENCE}
EMOJI = {
    "prompt": "a rocket in the style of openmoji line",
    "target_concepts": "rocket,openmoji line",
    "gen_guidance_scale": 3.0,
    "query_form": "concept",
    "scope": "local",
    "nfe": 3,
    "epochs": 4,
    "damping": 1.0,
    "batch_size": 32,
    "dtype": "fp32",
    "sd_model_path": str(ROOT / "data/emoji/pipeline"),
    "data_dir": str(ROOT / "data/emoji"),
    "num_split": 4,
    "grad_dir": str(ROOT / "experiments/emoji/results/grads"),
    "results_dir": str(ROOT / "experiments/emoji/results/qual"),
}
# the reference's, but for EPOCHS: 28 trajectories read at nine states are its 256 single states
ABC = {
    "recipe": "reference",
    "proj_dim": 2**15,
    "store_dtype": "float32",
    "batch_size": 4,
    "epochs": 28,
    "num_train": 100_000,
    "damping": 10.0,
}
OWN = {  # your own pictures under Stable Diffusion: the cheap recipe
    "proj_dim": 2**13,
    "batch_size": 4,
    "query_form": "concept",
    "scope": "local",
    "nfe": 5,
    "epochs": 4,
    "damping": 1.0,
    "num_split": 4,
    "grad_dir": str(ROOT / "experiments/own/results/grads"),
    "results_dir": str(ROOT / "experiments/own/results/qual"),
}
BENCHMARKS = {"emoji": EMOJI, "abc": ABC, "own": OWN}


def resolve(benchmark: str, overrides: dict) -> Settings:
    """Settings of a benchmark with what the user set on top. UserError for a benchmark, recipe or
    value that does not exist.
    """
    base = _choose(BENCHMARKS, benchmark, "benchmark")
    recipe = _choose(RECIPES, overrides.get("recipe", base.get("recipe", "default")), "RECIPE")
    settings = Settings(**{**base, **recipe, **overrides})
    if min(abs(settings.damping / d - 1) for d in DAMPINGS) > 1e-6:
        raise UserError(
            f"DAMPING={settings.damping:g} is not one of the sweep "
            f"{', '.join(f'{d:g}' for d in DAMPINGS)}"
        )
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise UserError(
                f"{name.upper()}={getattr(settings, name)!r} is unknown; use one of "
                f"{', '.join(choices)}"
            )
    for name, (low, high) in BOUNDS.items():
        value = getattr(settings, name)
        if not (value >= low and (high is None or value <= high)):  # a NaN is refused, too
            raise UserError(
                f"{name.upper()}={value} is out of range; give at least {low}"
                + ("" if high is None else f" and at most {high}")
            )
    return settings


def _choose(table: dict, key: str, what: str) -> dict:
    if key not in table:
        raise UserError(f"{what} {key!r} is unknown; use one of {', '.join(table)}")
    return table[key]


def as_dict(settings: Settings) -> dict:
    """Plain JSON types; paths inside the repository are given relative to it, so that results do
    not depend on where it lies.
    """
    return {
        k: v.removeprefix(f"{ROOT}/") if isinstance(v, str) else v
        for k, v in dataclasses.asdict(settings).items()
    }


def digest(value) -> str:
    """First 10 hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def provenance() -> dict:
    """Versions, platform and git commit that made a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    def run(*args):
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20
        ).stdout.strip()

    try:
        commit = run("rev-parse", "HEAD")
        return (
            f"{commit}{'-dirty' if run('status', '--porcelain', '--untracked-files=no') else ''}"
            if commit
            else None
        )
    except (OSError, subprocess.SubprocessError):
        return None
