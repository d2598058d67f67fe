"""AbC: does the ranking find the exemplars that taught a token, among them and the train pictures?

    row of an exemplar   the train row (same states, objective, sign and norm) of its picture under the task's train prompt
    row of a query       the concept gradient of the prompt against the prompt without <new1>, from the x_T of the picture's number
    score = q (X^T X + lambda I)^-1 [X; X_exemplars]^T        X from the train pictures alone

Recall@10 with both denominators in use: min(10, exemplars) (Concept-TRAK) and exemplars (Wang et
al. 2023); the same at the other end of the ranking; mean average precision. One fixed damping for
all tasks; the best one for each task is named oracle.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ..attribution.attribute import generate, model_identity, query_states
from ..attribution.corpus import Corpus
from ..attribution.train_grad import find_store, folder_name, open_store, row_settings, train_states
from ..datasets.abc import Task, chosen_tasks, exemplars
from ..datasets.folder import ImageCaptionDataset, pictures
from ..errors import UserError
from ..files import write_json
from ..models.tokens import load_token
from ..parsing import parse_memory
from ..report import ConceptResult, write_results
from ..rows import featurize, query
from ..scoring import fisher, metrics, scores
from ..settings import DAMPINGS, TOKEN, Settings, as_dict, provenance
from ..store.cached import cached_array


def token_path(settings: Settings, task: Task) -> Path:
    """The embedding of the task's token: TI_MODEL_PATH, else what run_ti.sh made, else the token of
    the release's model.

    UserError naming the places looked at when there is none.
    """
    root, model = Path(settings.data_dir), task.model_path
    places = (
        [Path(settings.ti_model_path) / settings.ti_weight_name]
        if settings.ti_model_path
        else [
            root / model.replace("models", "models-ti", 1) / "new1.safetensors",
            root / model.replace("models", "models-ti", 1) / settings.ti_weight_name,
            root / model / f"{TOKEN}.bin",
        ]
    )
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise UserError(
            f"no embedding of {TOKEN} for {model}: none of {', '.join(map(str, places))}; train "
            "it with scripts/abc/run_ti.sh"
        )
    return found


def exemplar_pictures(settings: Settings, task: Task) -> ImageCaptionDataset:
    """The exemplars, captioned with the task's train prompt."""
    return pictures(exemplars(Path(settings.data_dir), task), task.train_prompt)


def exemplar_rows(corpus: Corpus, number: int, task: Task) -> np.ndarray:
    """[E, k] train rows of the exemplars, kept as task_grad-{number}.npy beside the train rows."""
    s, model, shown = corpus.settings, corpus.model, exemplar_pictures(corpus.settings, task)
    identity = {**model_identity(corpus), "rows": row_settings(s), "pictures": shown.content_hash()}

    def compute():
        cond_null, rows = model.encode_prompts([""]), []
        for start in range(0, len(shown), s.batch_size):
            part = range(start, min(start + s.batch_size, len(shown)))
            x0 = model.encode_images(shown.images(part, size=model.image_size))
            cond = model.encode_prompts([task.train_prompt] * len(part))
            rows.append(
                featurize.featurize(
                    model,
                    corpus.projection,
                    x0,
                    cond,
                    cond_null,
                    layer=s.layer,
                    objective=s.f,
                    states=train_states(s),
                    normalize=s.normalize,
                )[0]
                .cpu()
                .numpy()
            )
        return np.concatenate(rows)

    return cached_array(
        Path(s.grad_dir) / folder_name(s) / f"task_grad-{number}.npy",
        identity,
        compute,
        s.force_recompute_concept_grad,
    )


def query_row(corpus: Corpus, number: int, task: Task) -> np.ndarray:
    """[1, k] concept gradient of the task, kept as test_grad-{number}.npy."""
    s, model = corpus.settings, corpus.model
    keys = (
        "nfe",
        "normalize",
        "layer",
        "scope",
        "eta",
        "epochs",
        "concept_guidance_scale",
        "gen_num_inference_steps",
        "batch_size",
        "dtype",
    )
    identity = {
        **model_identity(corpus),
        "prompt": task.prompt,
        "negative": task.negative_prompt,
        "seed": task.seed,
        "two_sided": s.two_sided,
        **{k: getattr(s, k) for k in keys},
    }

    def compute():
        if s.scope == "local":
            raise UserError("tasks have no picture of this model: use SCOPE=seed or SCOPE=global")
        x_T = torch.randn(
            1, *model.latent_shape, generator=torch.Generator().manual_seed(task.seed)
        ).to(model.device, model.dtype)
        cond, cond_minus, cond_null = model.encode_prompts(
            [task.prompt, task.negative_prompt, ""]
        ).split(1)
        read = query.read_states(
            model, query_states(s), cond, cond_null, x_T=x_T, batch_size=s.batch_size
        )
        row = query.concept_gradient(
            model,
            corpus.projection,
            read,
            cond,
            cond_minus,
            layer=s.layer,
            normalize=s.normalize,
            two_sided=s.two_sided,
            batch_size=s.batch_size,
        )
        return row.cpu().numpy()

    name = (
        f"{s.layer.replace('|', '+')}-test_grad-NFE{s.nfe}-gs_{s.concept_guidance_scale}-eta_{s.eta}"
        + ("-norm" if s.normalize else "")
    )
    return cached_array(
        Path(s.grad_dir) / name / f"test_grad-{number}.npy",
        identity,
        compute,
        s.force_recompute_concept_grad,
    )


def run_rows(settings: Settings, device: str, kind: str) -> None:
    """Compute and keep the rows of TASK_IDX: kind "exemplar" or "query"."""
    tasks, corpus = chosen_tasks(settings), Corpus(settings, device)
    find_store(corpus)  # for its mask, should it be there
    for number, task in tasks.items():
        load_token(corpus.model, token_path(settings, task), TOKEN)
        rows = {"exemplar": exemplar_rows, "query": query_row}[kind](corpus, number, task)
        print(f"task {number} ({task.model_path}): {kind} rows {list(rows.shape)}")


def measure(values: np.ndarray, relevant: np.ndarray, fixed: int) -> dict:
    """Metrics of one task at DAMPINGS[fixed], the oracle's beside them; values [D, N + E], relevant
    bool [N + E].
    """
    columns = {
        "recall_at_10": metrics.recall_at_k(values, relevant),
        "recall_at_10_of_exemplars": metrics.recall_at_k(values, relevant, denominator="relevant"),
        "reverse_recall_at_10": metrics.least_k_recall(values, relevant),
        "map": metrics.average_precision(values, relevant),
    }
    best = int(np.argmax(columns["recall_at_10"]))
    return {
        **{name: float(c[fixed]) for name, c in columns.items()},
        "oracle": {
            "damping": DAMPINGS[best],
            **{name: float(c[best]) for name, c in columns.items()},
        },
    }


class Joined:
    """Train pictures followed by exemplars, as far as a report needs them."""

    def __init__(self, train: ImageCaptionDataset, exemplar: ImageCaptionDataset):
        self.parts, self.captions, self.num_train = (
            (train, exemplar),
            [*train.captions, *exemplar.captions],
            len(train),
        )

    def images(self, indices, size=None) -> np.ndarray:
        """uint8 [n, H, W, 3]; pictures of different sizes need `size`."""
        n, (train, exemplar) = self.num_train, self.parts
        return np.stack(
            [
                (train if i < n else exemplar).images([i if i < n else i - n], size=size)[0]
                for i in map(int, indices)
            ]
        )


def evaluate_tasks(settings: Settings, device: str) -> dict:
    """Score all tasks of TASK_IDX in one pass over the train rows; prints a table and, last, one
    JSON object.
    """
    tasks, corpus = chosen_tasks(settings), Corpus(settings, device)
    store = open_store(corpus)
    queries, exemplar, drawn = [], [], []
    for number, task in tasks.items():
        load_token(corpus.model, token_path(settings, task), TOKEN)
        queries.append(query_row(corpus, number, task))
        exemplar.append(exemplar_rows(corpus, number, task))
        drawn.append(
            generate(corpus, task.prompt, task.seed).image
        )  # from the x_T that the query gradient starts at
    memory, fixed = (
        parse_memory(settings.max_memory),
        int(np.argmin(np.abs(np.log(np.array(DAMPINGS) / settings.damping)))),
    )
    solved = fisher.precondition(
        store,
        np.concatenate(queries),
        DAMPINGS,
        memory,
        device=device,
        widths=corpus.projection.widths,
    )
    of_train, results = scores.scores(store, solved, max_memory=memory, device=device), {}
    for t, (number, task) in enumerate(tasks.items()):
        values = np.concatenate([of_train[:, t], solved[:, t] @ exemplar[t].T], 1)
        relevant = np.arange(values.shape[1]) >= store.num_rows
        results[number] = {
            "test_case": task.test_case,
            "exemplars": len(exemplar[t]),
            **measure(values, relevant, fixed),
        }
        write_task(corpus, number, task, drawn[t], values, relevant)
        print(
            f"task {number:3} {task.model_path:32} recall@10 "
            f"{results[number]['recall_at_10']:.2f}   map {results[number]['map']:.3f}"
        )
    summary = summarise(list(results.values())) | {
        "damping": settings.damping,
        "tasks": len(tasks),
        "num_train": store.num_rows,
    }
    folder = Path(settings.results_dir).parent / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "metrics.json",
        {**summary, "per_task": results, "settings": as_dict(settings), "provenance": provenance()},
    )
    print(json.dumps(summary))
    return summary


def summarise(results: list[dict]) -> dict:
    """Means over tasks, with a 95 % interval of Recall@10 over tasks."""
    names = ("recall_at_10", "recall_at_10_of_exemplars", "reverse_recall_at_10", "map")
    low, high = metrics.bootstrap_interval([r["recall_at_10"] for r in results])
    return {
        **{name: float(np.mean([r[name] for r in results])) for name in names},
        "ci95": [low, high],
        "oracle": {name: float(np.mean([r["oracle"][name] for r in results])) for name in names},
    }


def write_task(
    corpus: Corpus, number: int, task: Task, picture, values: np.ndarray, relevant: np.ndarray
) -> None:
    """eval/task_{number}/: grids and tables of the ranking, metrics.json. Left out, with a word,
    where the train pictures are not on disk.
    """
    s = corpus.settings
    try:
        ranked = Joined(corpus.train, exemplar_pictures(s, task))
    except UserError as error:
        print(f"no pictures for task {number}: {error}")
        return
    folder = Path(s.results_dir).parent / "eval" / f"task_{number}"
    result = ConceptResult(task.prompt, task.negative_prompt, values, DAMPINGS, relevant)
    write_results(
        folder,
        query_image=picture,
        concept=result,
        dataset=ranked,
        top_k=s.top_k,
        settings=as_dict(s),
        provenance=provenance(),
        render_leastk=s.render_leastk,
        fixed_damping=s.damping,
        num_train=ranked.num_train,
    )
