"""AbC: does the ranking find the exemplars that taught a token, among them and the train pictures?

    row of an exemplar   the train row of its picture under the task's train prompt
                         (same states, objective, sign and norm)
    row of a query       the concept gradient of the prompt against the prompt without <new1>,
                         from the x_T of the picture's number
    score                q (X^T X + lambda I)^-1 [X; X_exemplars]^T, X from the train pictures alone

Recall@10 with both denominators in use: min(10, exemplars) (Concept-TRAK) and exemplars (Wang et
al. 2023); the same at the other end of the ranking; mean average precision. One fixed damping for
all tasks; the best one for each task is named oracle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from concept_trak.attribution.attributors import GradientAttributor
from concept_trak.attribution.naming import store_base, store_name
from concept_trak.attribution.question import Query, QueryImage, generate
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.train_grad import compute_gradients, open_store
from concept_trak.datasets.image_folder import ImageCaptionDataset, read_images
from concept_trak.errors import UserError
from concept_trak.flags import command
from concept_trak.models.learned_tokens import load_token
from concept_trak.models.sample import initial_noise
from concept_trak.registry import OBJECTIVES
from concept_trak.report.context import ReportContext
from concept_trak.report.results import write_results
from concept_trak.scoring import metrics
from concept_trak.scoring.result import ConceptResult
from concept_trak.scoring.scores import scores
from concept_trak.settings import DAMPINGS, TOKEN, Settings, as_dict, provenance
from concept_trak.store.array_cache import cached
from concept_trak.store.store import Store
from experiments.benchmark.results import result_folder, write_metrics

from .tasks import Task, below, chosen_tasks, exemplars, token_folder


def token_path(settings: Settings, task: Task) -> Path:
    """The embedding of the task's token: TI_MODEL_PATH, else what run_ti.sh made, else the token of
    the release's model.

    UserError naming the places looked at when there is none.
    """
    root, model = Path(settings.data_dir), task.model_path
    own = token_folder(root, task)
    places = (
        [Path(settings.ti_model_path) / settings.ti_weight_name]
        if settings.ti_model_path
        else [
            own / "new1.safetensors",
            own / settings.ti_weight_name,
            below(root, f"{model}/{TOKEN}.bin", "the task's model"),
        ]
    )
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise UserError(
            f"no embedding of {TOKEN} for {model}: none of {', '.join(map(str, places))}; train "
            f"it: {command('train-token', settings, ('tasks', 'data_dir', 'sd_model_path'))}"
        )
    return found


def exemplar_pictures(settings: Settings, task: Task) -> ImageCaptionDataset:
    """The exemplars, captioned with the task's train prompt."""
    return read_images(exemplars(Path(settings.data_dir), task), task.train_prompt)


def exemplar_rows(attribution_task: AttributionTask, number: int, task: Task) -> np.ndarray:
    """[E, k] train rows of the exemplars, kept as task_grad-{number}.npy beside the train rows; of
    an objective that weights its rows [E, k + 1], what the weight is made from last.
    """
    s, model, shown = (
        attribution_task.settings,
        attribution_task.model,
        exemplar_pictures(attribution_task.settings, task),
    )
    made_from = attribution_task.identity(pictures=shown.content_hash(), tokens=model.tokens)
    weighted = OBJECTIVES.get(s.f).row_weight is not None

    def compute() -> np.ndarray:
        rows = []
        for start in range(0, len(shown), s.batch_size):
            part = range(start, min(start + s.batch_size, len(shown)))
            x0 = model.encode_images(shown.images(part, size=model.image_size))
            cond = model.encode_prompts([task.train_prompt] * len(part))
            made = compute_gradients(attribution_task, x0, cond, [task.train_prompt] * len(part))
            parts = [made.values, made.losses[:, None]] if weighted else [made.values]
            rows.append(torch.cat(parts, 1).cpu().numpy())
        return np.concatenate(rows)

    path = store_base(s) / store_name(s) / f"task_grad-{number}.npy"
    return cached(path, made_from, compute, s.force_recompute_concept_grad)


def query_row(attribution_task: AttributionTask, number: int, task: Task) -> np.ndarray:
    """[1, k] concept gradient of the task, kept as test_grad-{number}.npy."""
    s, model = attribution_task.settings, attribution_task.model
    if s.scope == "local":
        raise UserError("tasks have no picture of this model: use SCOPE=seed or SCOPE=global")
    x_T = initial_noise(model.latent_shape, task.seed).to(model.device, model.dtype)
    picture = QueryImage(task.prompt, None, x_T, None, {"x_T of seed": task.seed})
    question = Query(picture, TOKEN, task.prompt, task.negative_prompt)
    ranker = GradientAttributor(attribution_task)
    layer, guidance = s.layer.replace("|", "+"), s.concept_guidance_scale
    name = f"{layer}-test_grad-NFE{s.nfe}-gs_{guidance}-eta_{s.eta}"
    path = store_base(s) / (name + ("-norm" if s.normalize else "")) / f"test_grad-{number}.npy"
    made_from, force = ranker.identity(question), s.force_recompute_concept_grad
    return cached(path, made_from, lambda: ranker.row(question), force)


def run_rows(settings: Settings, device: str, kind: str) -> None:
    """Compute and keep the rows of TASK_IDX: kind "exemplar" or "query"."""
    tasks, attribution_task = chosen_tasks(settings), AttributionTask(settings, device)
    for number, task in tasks.items():
        load_token(attribution_task.model, token_path(settings, task), TOKEN)
        rows = {"exemplar": exemplar_rows, "query": query_row}[kind](attribution_task, number, task)
        print(f"task {number} ({task.model_path}): {kind} rows {list(rows.shape)}")


def measure(values: np.ndarray, relevant: np.ndarray, fixed: int) -> dict[str, Any]:
    """Metrics of one task at DAMPINGS[fixed], the oracle's beside them.

    values [D, N + E], relevant bool [N + E].
    """
    columns = {
        "recall_at_10": metrics.recall_at_k(values, relevant),
        "recall_at_10_of_exemplars": metrics.recall_at_k(values, relevant, denominator="relevant"),
        "reverse_recall_at_10": metrics.least_k_recall(values, relevant),
        "map": metrics.average_precision(values, relevant),
    }
    best = int(np.argmax(columns["recall_at_10"]))
    at = {d: {name: float(c[d]) for name, c in columns.items()} for d in (fixed, best)}
    return at[fixed] | {"oracle": {"damping": DAMPINGS[best], **at[best]}}


class TrainAndExemplars:
    """Train pictures followed by exemplars, as far as a report needs them."""

    def __init__(self, train: ImageCaptionDataset, exemplar: ImageCaptionDataset) -> None:
        self.train, self.exemplar, self.num_train = train, exemplar, len(train)
        self.captions = [*train.captions, *exemplar.captions]

    def images(self, indices: Iterable[int], size: int | None = None) -> np.ndarray:
        """uint8 [n, H, W, 3]; pictures of different sizes need `size`."""
        return np.stack([self._image(int(i), size) for i in indices])

    def _image(self, i: int, size: int | None) -> np.ndarray:
        n = self.num_train
        return (self.train if i < n else self.exemplar).images([i if i < n else i - n], size)[0]


def evaluate_tasks(settings: Settings, device: str) -> dict[str, Any]:
    """Score all tasks of TASK_IDX in one pass over the train rows; prints a table and, last, one
    JSON object.
    """
    tasks, attribution_task = chosen_tasks(settings), AttributionTask(settings, device)
    store = open_store(attribution_task)
    settings = attribution_task.settings  # now those of the rows
    queries, exemplar, drawn = [], [], []
    for number, task in tasks.items():
        load_token(attribution_task.model, token_path(settings, task), TOKEN)
        queries.append(query_row(attribution_task, number, task))
        exemplar.append(exemplar_rows(attribution_task, number, task))
        # from the x_T that the query gradient starts at
        drawn += generate(attribution_task.model, settings, [task.prompt], task.seed)
    per_task: dict[int, dict[str, Any]] = {}
    found = score_tasks(attribution_task, store, np.concatenate(queries), exemplar)
    made_from = [store.checksum, {str(n): vars(task) for n, task in tasks.items()}]
    with result_folder(settings, "eval", "tasks", made_from) as folder:
        for (number, task), values, picture in zip(tasks.items(), found, drawn, strict=True):
            relevant = np.arange(values.shape[1]) >= store.num_rows
            case = {"test_case": task.test_case, "exemplars": int(relevant.sum())}
            result = ConceptResult(task.prompt, task.negative_prompt, values, DAMPINGS, relevant)
            metric = measure(values, relevant, result.damping_index(settings.damping))
            per_task[number] = case | metric
            write_task(folder / f"task_{number}", attribution_task, task, picture, result)
            recall, precision = (metric[name] for name in ("recall_at_10", "map"))
            told = f"recall@10 {recall:.2f}   map {precision:.3f}"
            print(f"task {number:3} {task.model_path:32} {told}")
        counts = {"damping": settings.damping, "tasks": len(tasks), "num_train": store.num_rows}
        summary = summarise(list(per_task.values())) | counts
        write_metrics(folder, "metrics", {**summary, "per_task": per_task}, settings)
    print(json.dumps(summary))
    return summary


def score_tasks(
    attribution_task: AttributionTask, store: Store, queries: np.ndarray, exemplar: list[np.ndarray]
) -> list[np.ndarray]:
    """Scores [D, N + E] of each task: the train pictures', then its own exemplars'."""
    solver, weight = (
        attribution_task.preconditioner,
        OBJECTIVES.get(attribution_task.settings.f).row_weight,
    )
    solved, among = solver.solve(store, queries, DAMPINGS), store.losses() if weight else None
    of_rows = None if weight is None else weight(among, among)
    of_train = scores(store, solved, of_rows, solver.budget.max_memory, solver.budget.device)
    found = []
    for t, rows in enumerate(exemplar):
        own = solved[:, t] @ rows[:, : store.dim].T
        own = own if weight is None else own * weight(rows[:, -1], among)
        found.append(np.concatenate([of_train[:, t], own], 1))
    return found


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
    folder: Path,
    attribution_task: AttributionTask,
    task: Task,
    picture: QueryImage,
    result: ConceptResult,
) -> None:
    """Grids and tables of the ranking, metrics.json.

    Left out, with a word, where the train pictures are not on disk.
    """
    s = attribution_task.settings
    try:
        ranked = TrainAndExemplars(attribution_task.train, exemplar_pictures(s, task))
    except UserError as error:
        print(f"no pictures for {folder.name}: {error}")
        return
    image = Image.fromarray(picture.pixels)
    shown = ReportContext(image, ranked, s.top_k, s.damping, as_dict(s), provenance())
    options = {"render_leastk": s.render_leastk, "num_train": ranked.num_train}
    write_results(folder, result, shown, **options)
