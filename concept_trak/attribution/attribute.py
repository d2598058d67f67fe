"""The main job: generate a picture, and rank the training images that taught the model each target
concept of its prompt.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from ..datasets import emoji
from ..files import disk_errors, write_json
from ..models.ddim import ddim_sample
from ..parsing import parse_memory
from ..report import ConceptResult, write_report, write_results
from ..rows import query
from ..rows.featurize import noise_levels
from ..scoring import fisher, scores
from ..settings import DAMPINGS, Settings, as_dict, digest, provenance
from ..store.cached import cached_array
from . import prompts
from .corpus import Corpus
from .train_grad import folder_name, open_store


@dataclass
class Query:
    """A generated picture and where it came from: x_T and x0 [1, C, h, w]."""

    prompt: str
    image: Image.Image
    x_T: torch.Tensor
    x0: torch.Tensor


def generate(corpus: Corpus, prompt: str, seed: int) -> Query:
    """DDIM sample of the prompt from a seed; the noise is drawn on the CPU, so that a seed means
    the same on every device.
    """
    s, model = corpus.settings, corpus.model
    x_T = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(seed)).to(
        model.device, model.dtype
    )
    cond, cond_null = model.encode_prompts([prompt, s.negative_prompt]).split(1)
    x0, _ = ddim_sample(
        model, x_T, cond, cond_null, scale=s.gen_guidance_scale, num_steps=s.gen_num_inference_steps
    )
    return Query(prompt, model.decode(x0)[0], x_T, x0)


def query_states(settings: Settings) -> query.QueryStates:
    """Where the query's states come from, by scope: noisings at the train rows' levels,
    trajectories at those of their own grid.
    """
    s = settings
    levels = (
        noise_levels(s.nfe)
        if s.scope == "local"
        else query.trajectory_timesteps(s.nfe, s.gen_num_inference_steps)
    )
    return query.QueryStates(
        s.scope, s.epochs, levels, s.gen_num_inference_steps, s.concept_guidance_scale, s.eta
    )


def concept_row(corpus: Corpus, asked: Query, plus: str, minus: str) -> np.ndarray:
    """[1, k] query gradient of one concept, given as c+ and c-, at the states of the asked picture."""
    s, model = corpus.settings, corpus.model
    cond, cond_plus, cond_minus, cond_null = model.encode_prompts(
        [asked.prompt, plus, minus, ""]
    ).split(1)
    read = query.read_states(
        model, query_states(s), cond, cond_null, x_T=asked.x_T, x0=asked.x0, batch_size=s.batch_size
    )
    row = query.concept_gradient(
        model,
        corpus.projection,
        read,
        cond_plus,
        cond_minus,
        layer=s.layer,
        normalize=s.normalize,
        two_sided=s.two_sided,
        batch_size=s.batch_size,
    )
    return row.cpu().numpy()


def gradient_identity(corpus: Corpus, contrast: tuple[str, str]) -> dict:
    """Everything that went into a concept gradient; a cached one is used only if all of it is the
    same.
    """
    s = corpus.settings
    keys = (
        "prompt",
        "seed",
        "scope",
        "layer",
        "nfe",
        "normalize",
        "concept_guidance_scale",
        "gen_guidance_scale",
        "gen_num_inference_steps",
        "negative_prompt",
        "f",
        "eta",
        "epochs",
        "batch_size",
        "dtype",
        "recipe",
    )
    return {
        **model_identity(corpus),
        "contrast": list(contrast),
        **{k: getattr(s, k) for k in keys},
    }


def model_identity(corpus: Corpus) -> dict:
    """What a query gradient depends on beside its question."""
    return {
        "model": corpus.model.weight_hash(),
        "tokens": corpus.model.tokens,
        "projection": corpus.projection.describe(),
        "levels": list(query_states(corpus.settings).timesteps),
        "device": corpus.device,
        "torch": torch.__version__,
    }


def check_words(corpus: Corpus, prompt: str, targets: list[str]) -> list[np.ndarray | None]:
    """The truth of each target where the data has labels, else None. UserError for a word that
    labelled data does not know.
    """
    data = corpus.everything
    if all(v is None for v in data.column("object")) and all(
        v is None for v in data.column("style")
    ):
        return [None] * len(targets)
    if style := prompts.STYLE.search(prompt):
        emoji.concept(data, style.group(1))
    return [emoji.relevant(corpus.train, target) for target in targets]


def query_folders(settings: Settings, targets: list[str]) -> tuple[Path, list[Path]]:
    """(folder of the report, one folder a target), named as in the reference."""
    s = settings
    tail = f"{s.layer.replace('|', '+')}-{s.f}-train_gs_{s.train_guidance_scale}-test_gs_{s.concept_guidance_scale}-eta_{s.eta}-seed_{s.seed}"
    tail += ("-norm" if s.normalize else "") + ("-ddim" if s.ddim_inversion else "")
    base, stem = Path(s.results_dir) / "free_query", prompts.query_slug(s.prompt)
    return base / f"{stem}-{tail}", [
        base / f"{stem}-target_{prompts.target_slug(t)}-{tail}" for t in targets
    ]


def save_query(folder: Path, asked: Query, meta: dict) -> None:
    """query_noise/query_xT as safetensors (no pickles), query_meta.json; the picture itself comes
    with the results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    x_T, x0 = asked.x_T.cpu().contiguous(), asked.x0.cpu().contiguous()
    for stem, tensors in (("query_noise", {"noise": x_T}), ("query_xT", {"x_T": x_T, "x0": x0})):
        part = folder / f"{stem}.safetensors.part"
        with disk_errors(part):
            save_file(tensors, part)
            part.replace(folder / f"{stem}.safetensors")
    write_json(folder / "query_meta.json", meta)


def unseen(corpus: Corpus, prompt: str) -> bool | None:
    """True if the prompt is a held-out caption, False if a training one, None if neither."""
    if prompt in corpus.train.captions:
        return False
    return True if prompt in corpus.everything.captions else None


def attribute(corpus: Corpus) -> Path:
    """Run the main job for the settings of `corpus`; returns the path of report.html."""
    s = corpus.settings
    targets = prompts.split_list(s.target_concepts)
    contrasts = prompts.contrasts(s.query_form, s.prompt, targets, s.negative_prompts)
    truths = check_words(corpus, s.prompt, targets)
    store = open_store(corpus)
    asked = generate(corpus, s.prompt, s.seed)
    report_folder, folders = query_folders(s, targets)
    rows, made = [], provenance()
    for target, contrast, folder in zip(targets, contrasts, folders):
        plus, minus = contrast
        save_query(
            folder,
            asked,
            {
                "prompt": s.prompt,
                "target": target,
                "plus": plus,
                "negative": minus,
                "settings": as_dict(s),
                "provenance": made,
            },
        )
        print(f"{target!r}: {plus!r} against {minus!r}")
        rows.append(
            cached_array(
                folder / "concept_grad.npy",
                gradient_identity(corpus, contrast),
                functools.partial(concept_row, corpus, asked, plus, minus),
                s.force_recompute_concept_grad,
            )
        )
    memory = parse_memory(s.max_memory)
    solved = fisher.precondition(
        store,
        np.concatenate(rows),
        DAMPINGS,
        memory,
        device=corpus.device,
        widths=corpus.projection.widths,
    )
    values = scores.scores(store, solved, max_memory=memory, device=corpus.device)
    results = [
        ConceptResult(t, c[1], values[:, i], DAMPINGS, truth)
        for i, (t, c, truth) in enumerate(zip(targets, contrasts, truths))
    ]
    recorded = as_dict(s) | {
        "store": folder_name(s),
        "store_checksum": store.checksum,
        "settings_hash": digest(as_dict(s)),
    }
    for result, folder in zip(results, folders):
        write_results(
            folder,
            query_image=asked.image,
            concept=result,
            dataset=corpus.train,
            top_k=s.top_k,
            settings=recorded,
            provenance=made,
            render_leastk=s.render_leastk,
            fixed_damping=s.damping,
        )
    report_folder.mkdir(parents=True, exist_ok=True)
    report = report_folder / "report.html"
    write_report(
        report,
        prompt=s.prompt,
        query_image=asked.image,
        concepts=results,
        dataset=corpus.train,
        top_k=s.top_k,
        settings=recorded,
        provenance=made,
        fixed_damping=s.damping,
        unseen=unseen(corpus, s.prompt),
    )
    return report
