"""What the settings ask for, in the words of other packages: states, what decides a row, folders.

Names and folders are told without loading torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..registry import OBJECTIVES
from ..settings import COMPONENT_FIELDS, Settings, as_dict, short_hash
from ..store.remote import local_base
from . import prompts

if TYPE_CHECKING:
    from ..gradients.states import QueryTimesteps, TrainTimesteps


def train_timesteps(settings: Settings) -> TrainTimesteps:
    """The reference's inversion (recipe reference), our own grid, or noisings."""
    from ..gradients.states import inversion_schedule, noising_schedule, reference_states

    s = settings
    if not s.ddim_inversion:
        return noising_schedule(s.nfe)
    inverted = reference_states if s.recipe == "reference" else inversion_schedule
    return inverted(s.nfe, s.train_guidance_scale)


def query_timesteps(settings: Settings, scope: str = "") -> QueryTimesteps:
    """Where the query's states come from, by scope (default: the settings').

    Noisings at the levels of the train rows, trajectories at those of their own grid.
    """
    from ..gradients.states import QueryTimesteps, noise_levels, trajectory_timesteps

    s, scope, steps = settings, scope or settings.scope, settings.gen_num_inference_steps
    levels = noise_levels(s.nfe) if scope == "local" else trajectory_timesteps(s.nfe, steps)
    return QueryTimesteps(scope, s.epochs, levels, steps, s.concept_guidance_scale, s.eta)


def gradient_settings(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a train row is."""
    s, states = settings, train_timesteps(settings)
    beside = OBJECTIVES.get(s.f).description
    return {
        "layer": s.layer,
        "f": s.f,
        "normalize": s.normalize,
        "timesteps": list(states.timesteps),
        "inversion_grid": list(states.inversion_grid),
        "guidance_scale": states.guidance_scale if states.inversion else None,
        "noise_seed": None if states.inversion else states.noise_seed,
        "dtype": s.dtype,
        **({} if beside is None else {"beside": beside}),
    }


def store_base(settings: Settings) -> Path:
    """The folder of GRAD_DIR's stores; for an address on object storage, that of their copies."""
    return local_base(settings.grad_dir, settings.store_cache)


def store_name(settings: Settings) -> str:
    """Of a store: {layer}-{f}-NFE{n}[-norm][-ddim-gs_{g}] as in the reference; our own inversion
    grid and other projections are appended.
    """
    s = settings
    name = f"{s.layer.replace('|', '+')}-{s.f}-NFE{s.nfe}" + ("-norm" if s.normalize else "")
    if s.ddim_inversion:
        name += f"-ddim-gs_{s.train_guidance_scale}" + ("" if s.recipe == "reference" else "-short")
    if s.lora_path:
        name += f"-lora_{short_hash(s.lora_path)}"
    projection = f"{s.proj_type}_{s.proj_dim}" + (f"_seed{s.proj_seed}" if s.proj_seed else "")
    projection += "-module" if s.blocks == "module" else ""
    projection += "" if s.proj_backend == "own" else f"-{s.proj_backend}"
    return name if projection == "random_mask_32768" else f"{name}-{projection}"


# what changes where, when and how fast a question is answered, but not the answer
NOT_DECIDING = {
    *("results_dir", "grad_dir", "data_dir", "source_dir", "sd_model_path", "lora_path", "device"),
    "fit_model_path",
    *("store_cache", "executor", "num_cpus", "num_gpus", "piece_rows", "task_retries"),
    *("gpu_id", "gpu_ids", "batch_size", "max_memory", "num_split", "shards", "num_queries"),
    *("methods", "task_idx", "task_json", "ti_model_path", "ti_weight_name", "store_dtype"),
    *("force_recompute_concept_grad", "repair", "retrain", "truth_dir", "replay_steps"),
    # what is asked of the weights decides no ranking of pictures
    *COMPONENT_FIELDS,
    *("concept", "export", "judged", "target_ua", "min_retention", "weights"),
    *("search", "candidates"),  # told in the name where it is not the scan
    *("listen_host", "listen_port", "queue_length", "answer_wait", "body_timeout", "body_bytes"),
    *("protocol", "prompts_file", "seeds_per_prompt", "classifier", "clip_model", "alexnet_path"),
    *("feature_model", "real_dir"),
}


def settings_digest(settings: Settings, *made_from: Any) -> str:
    """Hash of all that decides a result: the settings that change it, and what it is made from
    (checksum of the store, of the model), in place of the paths to them.
    """
    kept = {k: v for k, v in as_dict(settings).items() if k not in NOT_DECIDING}
    return short_hash([kept, *made_from])


def answer_folder(settings: Settings, *made_from: Any) -> Path:
    """Folder of an answer: named as in the reference, and by the hash of all that decides it.

    The same targets are the same question, whichever sign stands between them.
    """
    s = settings
    s = s.but(target_concepts="|".join(prompts.split_list(s.target_concepts)))
    tail = f"{s.layer.replace('|', '+')}-{s.f}-train_gs_{s.train_guidance_scale}"
    tail += f"-test_gs_{s.concept_guidance_scale}-eta_{s.eta}-seed_{s.seed}"
    tail += ("-norm" if s.normalize else "") + ("-ddim" if s.ddim_inversion else "")
    name = f"{prompts.query_slug(s.prompt)}-{tail}"[:200]
    # beside ours in one answer, which is another then
    asked: list[Any] = [s.methods] if s.methods else []
    asked += [] if s.search == "scan" else [s.search, s.candidates]
    asked += [{k: as_dict(s)[k] for k in COMPONENT_FIELDS}] if s.weights else []
    return Path(s.results_dir) / "free_query" / f"{name}-{settings_digest(s, *made_from, *asked)}"
