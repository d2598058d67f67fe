"""The one place for every default. A recipe or a benchmark only states where it departs; a script
only passes on what the user set.

    resolve("emoji", {"prompt": "..."})  ->  Settings
    fields < benchmark < recipe < what the user set
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from .errors import UserError
from .parsing import (
    check_selection,
    normalized,
    number_ranges,
    option,
    parse_gpu_ids,
    parse_memory,
    parse_methods,
    parse_shards,
    refuse_credentials,
)
from .registry import BENCHMARKS as REGISTERED
from .registry import OBJECTIVES, unknown

ABOVE = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (ABOVE / "pyproject.toml").is_file()
# What paths are given from: the repository, or where an installed package is called.
ROOT = ABOVE if IN_CHECKOUT else Path.cwd()
JUDGE = ROOT / "data/emoji/judge"  # of the embedded data, committed
# relative to the mean eigenvalue of K; the reference's lambda_r x 0.1
DAMPINGS = tuple(0.1 * 10.0**e for e in range(-4, 5))
TOKEN = "<new1>"  # the word that a token stands for in AbC and Custom Diffusion
PACKAGES = "torch diffusers transformers accelerate traker dattri numpy pillow safetensors".split()

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
    "sd_model_path": str(ROOT / "data/emoji/pipeline"),  # that of DATA_DIR, if it brings its own
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
PRESETS = {"emoji": EMOJI, "abc": ABC, "own": OWN}

PROJECTIONS = (
    *("identity", "random_mask", "normal", "rademacher", "trak_normal", "trak_rademacher"),
    *("sjlt", "grass", "logra"),
)
MASKS = (
    *("auto", "portable", "a100", "h100", "h200", "gh200", "h100-pcie", "v100", "b200", "p100"),
    *("a30", "rtx4090", "rtx4080", "rtx5090", "l40s", "l40", "rtx6000-ada", "l4", "a6000", "a40"),
    *("rtx3090ti", "rtx3090", "a10g", "rtx3080ti", "a10", "a5000", "t4", "rtx2080ti", "titan-rtx"),
)


def parse_damping(value: float) -> float:
    """One of DAMPINGS. UserError for another."""
    if min(abs(value / d - 1) for d in DAMPINGS) > 1e-6:
        sweep = ", ".join(f"{d:g}" for d in DAMPINGS)
        raise UserError(f"DAMPING={value:g} is not one of the sweep; set DAMPING to one of {sweep}")
    return value


@dataclass(frozen=True)
class QuestionSettings:
    """What is asked."""

    prompt: str = option("Pikachu in the style of Pablo Picasso", "what to generate and ask about")
    target_concepts: str = option(
        "Pikachu,Pablo Picasso",
        "words of the prompt, separated by ',' or, if they hold ',', by '|'",
    )
    negative_prompts: str = option("", "c- of each target, in order; empty: by QUERY_FORM")
    query_form: str = option(
        "slider",
        "c+ and c-: slider (prompt, prompt without the target), cfg (prompt, empty), "
        "concept (the target's words, empty)",
        choices=("slider", "cfg", "concept"),
    )


@dataclass(frozen=True)
class GenerationSettings:
    """How the query picture is generated."""

    negative_prompt: str = option("", "what the picture is guided away from")
    seed: int = option(0, "of the picture's noise, or of a training", low=0, high=2**63 - 1)
    gen_guidance_scale: float = option(7.5, "classifier-free guidance of the picture")
    gen_num_inference_steps: int = option(
        50, "of the picture and of the query's trajectories", "DDIM steps", low=2, high=999
    )


@dataclass(frozen=True)
class GradientSettings:
    """How rows are made."""

    recipe: str = option("default", "default, or reference: the paper's", choices=tuple(RECIPES))
    layer: str = option("attn2", "part of the parameter names, '|' between alternatives")
    f: str = option("contrast_llr", "train objective", choices=OBJECTIVES)
    nfe: int = option(10, "NFE - 1 states, at noise levels evenly from 100 to 900", low=2, high=500)
    ddim_inversion: bool = option(False, "states by DDIM inversion instead of noising")
    normalize: bool = option(True, "unit norm of each state's gradient, in each of the blocks")
    blocks: str = option(
        "module",
        "what is unit-normed and preconditioned by itself: each module, or all parameters as one",
        choices=("module", "all"),
    )
    train_guidance_scale: float = option(7.5, "classifier-free guidance of the inversion")


@dataclass(frozen=True)
class ProjectionSettings:
    """How rows are projected."""

    proj_type: str = option("logra", "kind of projection", choices=PROJECTIONS)
    proj_dim: int = option(
        4096, "length of a row, rounded down to fit the modules", "features", low=1
    )
    proj_seed: int = option(0, "of the random projection")
    proj_mask: str = option(
        "auto",
        "of random_mask: portable, a GPU whose mask to rebuild, or auto: that of the store, "
        "portable for a new one",
        choices=MASKS,
    )
    proj_backend: str = option(
        "own",
        "whose code projects: this library's own, dattri's or trak's",
        choices=("own", "dattri", "trak"),
    )


@dataclass(frozen=True)
class Query:
    """At which states the query is differentiated."""

    scope: str = option(
        "seed",
        "where they come from: the picture's own x_T (seed), a fresh x_T each draw (global), or "
        "noisings of the picture (local)",
        choices=("seed", "global", "local"),
    )
    concept_guidance_scale: float = option(1.0, "classifier-free guidance of trajectories")
    eta: float = option(0.1, "DDIM noise of the trajectories", low=0, high=1)
    epochs: int = option(8, "trajectories, or noisings, read at all states", "draws", low=1)
    force_recompute_concept_grad: bool = option(False, "ignore a cached query gradient")


@dataclass(frozen=True)
class Scoring:
    """How rows become scores."""

    damping: float = option(
        0.1, "the fixed one: 1e-05, 1e-04, ... or 1000", "mean eigenvalues", parse=parse_damping
    )
    search: str = option(
        "scan",
        "scan scores every picture; index only those that the index beside the rows finds "
        "(build_index.sh), enough for the highest and lowest scores",
        choices=("scan", "index"),
    )
    candidates: int = option(
        2000, "scored exactly from each end that an index finds, at each damping", "rows", low=10
    )
    max_memory: str = option("6GB", "bound on the working memory, e.g. 500MB", parse=parse_memory)


@dataclass(frozen=True)
class Report:
    """What is shown."""

    top_k: int = option(10, "how many of the highest scores to show", "pictures", low=1)
    render_leastk: bool = option(False, "also write the pictures with the lowest scores")
    weights: bool = option(
        False, "also show which weights carry each concept, and edits of them; minutes"
    )


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    sd_model_path: str = option(
        "CompVis/stable-diffusion-v1-4",
        "folder or hub id of a Stable Diffusion 1.x or 2.x pipeline",
        place=True,
    )
    lora_path: str = option("", "a LoRA on top of the model (safetensors)")
    fit_model_path: str = option(
        "",
        "pipeline of the same latents that judges in the model's place how well captions fit "
        "(F=contrast_llr), best one that has not learned the pictures; empty: the model itself",
    )
    dtype: str = option(
        "auto",
        "of the model; auto: fp16 on a GPU, fp32 on the CPU",
        choices=("auto", "fp32", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class Data:
    """The training pictures."""

    data_dir: str = option(
        str(ROOT / "data/abc"), "pictures and captions, or encoded pictures", place=True
    )
    source_dir: str = option("", "pictures and captions to encode into DATA_DIR")
    num_train: int = option(0, "only the first so many encoded ones; 0: all", "pictures", low=0)


@dataclass(frozen=True)
class StoreSettings:
    """Where rows are kept."""

    grad_dir: str = option(
        str(ROOT / "experiments/abc/results/grads"),
        "folder of the stores, or an address on object storage: s3://bucket/prefix",
        parse=refuse_credentials,
        place=True,
    )
    store_cache: str = option(
        "",
        "folder for copies of stores on object storage; empty: .cache/concept-trak/stores of the "
        "home folder",
    )
    num_split: int = option(16, "into how many files rows are split", "shards", low=1)
    shards: str = option(
        "", "which to compute, e.g. 3,7-9; empty: all", parse=partial(number_ranges, "SHARDS")
    )
    repair: bool = option(False, "make damaged finished shards again; the old files are kept")
    store_dtype: str = option(
        "float16", "of stored rows", choices=("float16", "bfloat16", "float32")
    )


@dataclass(frozen=True)
class RunSettings:
    """Where and how it runs."""

    results_dir: str = option(
        str(ROOT / "experiments/abc/results/qual"), "folder of the results", place=True
    )
    batch_size: int = option(16, "pictures, or draws, at a time", low=1)
    device: str = option("", "cpu, cuda:0, ...; empty: GPU_ID, or the first GPU, or the CPU")
    gpu_id: str = option("", "number of the GPU; empty: the first")
    gpu_ids: str = option(
        "", "one process on each, e.g. '0 1 2 3'; cpu for one on the CPU", parse=parse_gpu_ids
    )
    executor: str = option(
        "local",
        "who computes the train gradients: local (this process), gpus (processes on GPU_IDS, as "
        "whenever those are set), ray (the cluster of RAY_ADDRESS, or one that is started here)",
        choices=("local", "gpus", "ray"),
    )
    num_cpus: float = option(1.0, "that a task of EXECUTOR=ray takes", "CPUs", low=0, high=1024)
    num_gpus: float = option(
        0.0, "that a task of EXECUTOR=ray takes; 0: it computes on the CPU", "GPUs", low=0, high=64
    )
    piece_rows: int = option(
        1024, "that a task of EXECUTOR=ray computes, and keeps, at once", "rows", low=1
    )
    task_retries: int = option(
        5, "of a task of EXECUTOR=ray whose worker or node died", "times", low=0, high=1000
    )


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated."""

    num_queries: int = option(0, "at most so many of a kind; 0: all", "queries", low=0)
    methods: str = option(
        "",
        "what is compared, e.g. concept_trak,das; empty: all, and for one prompt ours alone",
        parse=parse_methods,
    )


@dataclass(frozen=True)
class Tasks:
    """The tasks of AbC."""

    task_idx: str = option(
        "0", "their numbers, e.g. 3,7-9; empty: all", parse=partial(number_ranges, "TASK_IDX")
    )
    task_json: str = option(
        str(ROOT / "experiments/abc/configs/all_tasks.json"), "their list", place=True
    )
    ti_model_path: str = option(
        "", "folder of the token; empty: where the release or run_ti.sh puts it"
    )
    ti_weight_name: str = option("new1.bin", "file of the token", place=True)


@dataclass(frozen=True)
class RetrainingSettings:
    """Training again."""

    retrain: bool = option(False, "train the models of a plan that have no presences yet; hours")
    truth_dir: str = option(
        str(ROOT / "experiments/truth/results"),
        "folder of checkpoints and rows of small models",
        place=True,
    )
    replay_steps: int = option(
        0, "of a shorter training, to try the scripts of scripts/cad; 0: all", "steps", low=0
    )


@dataclass(frozen=True)
class Components:
    """Which weights carry a concept, and what becomes of them."""

    concept: str = option(
        "", "the words to score; empty: the first of TARGET_CONCEPTS in PROMPT, or PROMPT"
    )
    base_prompt: str = option("", "what the concept is held against")
    ratio: float = option(0.015, "share of the selected weights to edit", high=1, low=1e-9)
    selection: str = option(  # chosen with RATIO by run_eval.sh, on objects that are not reported
        "cross_attention|feed_forward",
        "which weights, '|' between alternatives; paper: the published choice and rule",
        parse=check_selection,
    )
    granularity: str = option(
        "scalar",
        "what is edited as one: scalar, row, column, head, module",
        choices=("scalar", "row", "column", "head", "module"),
    )
    operator: str = option(
        "zero",
        "what becomes of the weights: zero, scale, mean (of their row), gradient (steps)",
        choices=("zero", "scale", "mean", "gradient"),
    )
    strength: float = option(1.0, "of the operators scale and gradient", low=0, high=100)
    score_seeds: int = option(4, "trajectories over which scores are averaged", "seeds", low=1)
    spare: str = option(
        "",
        "whose weights to leave alone: concepts, captions of the data, separated by '|'; captions: "
        "two of every style",
    )
    spare_weight: float = option(2.0, "of what SPARE needs, against the scores", low=0, high=100)
    edits: str = option("", "edits to apply before, files separated by '|'")
    export: str = option("", "folder for the edited pipeline, for diffusers to load")
    judged: int = option(200, "of the target, a headline cell of the evaluation", "pictures", low=4)
    target_ua: float = option(
        0.9, "share of its pictures that an erased concept may no longer be in", low=1e-9, high=1
    )
    min_retention: float = option(
        0.9, "of the accuracy on everything else, what an erasing edit must keep", low=0, high=1
    )


@dataclass(frozen=True)
class ServiceSettings:
    """How questions are taken over HTTP."""

    listen_host: str = option(
        "127.0.0.1", "address to listen at; any but this machine's own needs API_TOKEN"
    )
    listen_port: int = option(8000, "port to listen at; 0: any free one", low=0, high=65535)
    queue_length: int = option(
        32,
        "waiting beside the one that is being answered; more are told to come again",
        "questions",
        low=0,
        high=10_000,
    )
    answer_wait: float = option(
        60.0,
        "how long a request waits for its answer before it is told where it will be",
        "seconds",
        low=0,
        high=86_400,
    )
    body_timeout: float = option(
        10.0, "how long the body of a request may take to arrive", "seconds", low=0.1, high=3600
    )
    body_bytes: int = option(
        2**16, "of the body of a request, at most", "bytes", low=256, high=2**24
    )


@dataclass(frozen=True)
class Protocols:
    """The published protocols for edited pipelines."""

    protocol: str = option(
        "objects",
        "what is measured: objects, nudity, styles, retention",
        choices=("objects", "nudity", "styles", "retention"),
    )
    prompts_file: str = option("", "prompts (.csv, COCO's .json, .txt); empty: a few of our own")
    seeds_per_prompt: int = option(8, "of a prompt that has no seed of its own", "pictures", low=1)
    classifier: str = option(
        "microsoft/resnet-50",
        "folder or hub id of transformers that names ImageNet's classes",
        place=True,
    )
    clip_model: str = option(
        "openai/clip-vit-base-patch32",
        "folder or hub id of the CLIP that scores captions",
        place=True,
    )
    alexnet_path: str = option("", "file of AlexNet's weights, for LPIPS")
    feature_model: str = option(
        "",
        "whose features the Frechet distance compares: folder or hub id of transformers, or the "
        ".pth of FID's Inception; empty: CLIP_MODEL's",
    )
    real_dir: str = option("", "folder of real pictures to compare with; empty: none")


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, by stage; each field can be read by its own name, too.

    The environment variable of a field is its name in capitals.
    """

    question: QuestionSettings = QuestionSettings()
    generation: GenerationSettings = GenerationSettings()
    rows: GradientSettings = GradientSettings()
    projection: ProjectionSettings = ProjectionSettings()
    query: Query = Query()
    scoring: Scoring = Scoring()
    report: Report = Report()
    model: ModelSettings = ModelSettings()
    data: Data = Data()
    store: StoreSettings = StoreSettings()
    run: RunSettings = RunSettings()
    evaluation: Evaluation = Evaluation()
    tasks: Tasks = Tasks()
    truth: RetrainingSettings = RetrainingSettings()
    components: Components = Components()
    service: ServiceSettings = ServiceSettings()
    protocols: Protocols = Protocols()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from {field: value}. TypeError for a name that is no field."""
        by_stage: dict[str, dict[str, Any]] = {stage: {} for stage in SECTIONS}
        for name, value in values.items():
            if name not in STAGE_OF:
                raise TypeError(f"Settings has no field {name!r}")
            by_stage[STAGE_OF[name]][name] = normalized(value) if name in OF_WORDS else value
        return cls(**{name: stage(**by_stage[name]) for name, stage in SECTIONS.items()})

    def __getattr__(self, name: str) -> Any:
        if name not in STAGE_OF:  # among them what copy and pickle ask for
            raise AttributeError(f"Settings has no field {name!r}")
        return getattr(getattr(self, STAGE_OF[name]), name)

    def flat(self) -> dict[str, Any]:
        """{field: value} over all stages."""
        return {k: v for stage in SECTIONS for k, v in vars(getattr(self, stage)).items()}

    def but(self, **changes: Any) -> Settings:
        """A copy with other values of some fields. TypeError for a name that is no field."""
        return Settings.of(self.flat() | changes)

    def on(self, device: str) -> Settings:
        """The settings with DTYPE=auto decided for a device, "cpu" or "cuda:0"."""
        if self.dtype != "auto":
            return self
        return self.but(dtype="fp32" if device == "cpu" else "fp16")


# SELECTION and RATIO of amplifying where neither is given: what raised the rate of objects rare in
# training, where the choice for erasing lowers it (scripts/cad/run_rare.sh)
AMPLIFY = {"selection": "paper", "ratio": 0.01}
# what the section "weights" of an answer is made with, and no ranking
COMPONENT_FIELDS = (
    *("base_prompt", "ratio", "selection", "granularity", "operator", "strength", "score_seeds"),
    *("spare", "spare_weight", "edits"),
)
# what is compared with captions and labels
OF_WORDS = ("prompt", "target_concepts", "negative_prompts", "negative_prompt", "concept", "spare")
SECTIONS = {field.name: type(field.default) for field in dataclasses.fields(Settings)}
STAGE_OF = {f.name: name for name, stage in SECTIONS.items() for f in dataclasses.fields(stage)}


def flat_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of all stages; `metadata["option"]` is what is known of one."""
    return tuple(field for stage in SECTIONS.values() for field in dataclasses.fields(stage))


def names() -> tuple[str, ...]:
    """The names of the fields of all stages."""
    return tuple(STAGE_OF)


def resolve(benchmark: str, overrides: dict[str, Any]) -> Settings:
    """Settings of a benchmark with what the user set on top.

    UserError for a benchmark, recipe or value that does not exist.
    """
    base = preset(benchmark)
    recipe = overrides.get("recipe", base.get("recipe", "default"))
    if recipe not in RECIPES:
        raise UserError(f"RECIPE={recipe!r} is unknown; set RECIPE to one of {', '.join(RECIPES)}")
    values = {**base, **RECIPES[recipe], **overrides}
    if benchmark == "emoji" and "sd_model_path" not in overrides:
        brought = Path(values["data_dir"]) / "pipeline"
        values |= {"sd_model_path": str(brought)} if brought.is_dir() else {}
    settings = Settings.of(values)
    found = settings.flat()
    for field in flat_fields():
        field.metadata["option"].check(field.name.upper(), found[field.name])
    parse_shards(found["shards"], found["num_split"])
    return settings


def preset(benchmark: str) -> dict[str, Any]:
    """The defaults of a benchmark; one that is registered elsewhere changes those of emoji.

    UserError for one that there is not.
    """
    if benchmark in PRESETS:
        return PRESETS[benchmark]
    known = dict.fromkeys((*PRESETS, *REGISTERED.names()))
    if benchmark not in known:
        raise UserError(unknown("--benchmark", benchmark, tuple(known)))
    return EMOJI | REGISTERED.get(benchmark).settings


def results_folder(settings: Settings, kind: str) -> Path:
    """RESULTS_DIR/{kind}, where all results but answers lie; beside RESULTS_DIR where that is one
    of the defaults, experiments/{benchmark}/results/qual.
    """
    given = Path(settings.results_dir)
    usual = given.name == "qual" and given.absolute().is_relative_to(ROOT / "experiments")
    return (given.parent if usual else given) / kind


def as_dict(settings: Settings) -> dict[str, Any]:
    """Plain JSON types, flat; paths inside the repository are given relative to it, so that results
    do not depend on where it lies.
    """
    return {
        k: v.removeprefix(f"{ROOT}/") if isinstance(v, str) else v
        for k, v in settings.flat().items()
    }


def short_hash(value: Any) -> str:
    """First 10 hex digits of the sha256 of a JSON value."""
    import hashlib  # here, like those below: they take as long as the rest of a start
    import json

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def version() -> str:
    """Of this package."""
    import importlib.metadata

    try:
        return importlib.metadata.version("concept-trak")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "of a checkout"


def provenance() -> dict[str, Any]:
    """Versions, platform and git commit that made a result."""
    import importlib.metadata
    import platform

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


@cache
def _git_commit() -> str | None:
    """Of the checkout when it was first asked for: what is changed there later is not what a
    process runs. None for an installed package, wherever it is called.
    """
    import subprocess

    def run(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        commit = run("rev-parse", "HEAD") if IN_CHECKOUT else ""
        changed = commit and run("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{'-dirty' if changed else ''}" if commit else None
