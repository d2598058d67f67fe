"""Retrained without a concept's top pictures, do the weights that an edit takes lose their score?

Four small models (`truth.small_model`), all but the second of one seed:

    all       of all pictures
    seed      of all pictures, another seed: what chance does
    without   of all but the union of our ranking's top pictures for 16 objects (the committed plan
              `counterfactual`; one training answers for all of them)
    random    of all but about as many random ones: what removing pictures does by itself

and each of the 16 objects asked of every one, as it is and with its erasing edit (weights set to
zero): retrained, edited, and both. Models of one seed begin at the same weights, so the edit of
`all` is put at the same positions in `without` and `random`; `seed` has an edit of its own.

    score      sum of alpha over the edited weights (0 with the edit, by definition)
    moves      mean J_erase: how far the prompt moves the prediction
    presence   log-likelihood ratio on held-out pictures of the object (`truth.concept_likelihood`)
    judged     the judge's probability of the object in pictures drawn
    others     presence of objects whose pictures all stayed

score, moves, presence and others as shares of the mean of `all`, unedited.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.atomic_io import make_folder, write_bytes, write_json
from concept_trak.attribution.task import AttributionTask
from concept_trak.components.concept_plan import (
    ComponentQuery,
    EditPlan,
    attribute_components,
    edited_values,
    plan_of,
)
from concept_trak.components.edit_operators import Operator
from concept_trak.components.edits import EditedNetwork, make_edit
from concept_trak.components.objective import COMPONENT_OBJECTIVES, mean_value
from concept_trak.components.parameter_groups import select
from concept_trak.components.scores import Scores
from concept_trak.components.selection import Picked, Selection, choose
from concept_trak.components.states import Sampling
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import remove_hint, script_hint
from concept_trak.models.text_to_image import TextToImage
from concept_trak.process import log
from concept_trak.scoring.metrics import bootstrap_interval
from concept_trak.settings import JUDGE, short_hash
from concept_trak.validated_io import read_json, read_numbers
from experiments.benchmark.results import result_folder, write_metrics
from experiments.emoji.classifier.io import load_judge
from experiments.emoji.classifier.net import EmojiClassifier
from experiments.training.loop import load_checkpoint
from experiments.truth import small_model
from experiments.truth import train as trainer
from experiments.truth.concept_likelihood import (
    ConceptMeasurements,
    MeasureSettings,
    classifier_rates,
    losses_of,
)
from experiments.truth.counterfactual import targets
from experiments.truth.setup import KEPT, MODELS, bench_of, format_interval, refuse_unmeasured
from experiments.truth.subsets import RetrainingPlan as Trainings
from experiments.truth.subsets import Subset, base_plan, kept_plan, split_concepts
from experiments.truth.train_many import RetrainingSetup, WorkerSpec, retrain

from .replay_attribution import as_trained, small_settings

KIND = "object"
RETRAINED = {"without": "object-concept_trak-0", "random": "object-random-0"}  # of the plan
LABELS = {
    "all": "all pictures",
    "seed": "all pictures, another seed",
    "without": "without the top pictures",
    "random": "without random ones",
}
FIGURES = ("score", "moves", "presence", "judged", "others")
STATES = ("unedited", "edited")
OTHERS = 8  # objects, a held-out picture each
SAMPLING = Sampling(3.0, 20, 10)
MEASURE = MeasureSettings(drawn=8)


@dataclass(frozen=True)
class Concept:
    """An object: its prompt, and held-out pictures that show it."""

    name: str
    prompt: str
    pictures: ImageCaptionDataset


def subsets_of(task: AttributionTask) -> dict[str, Subset]:
    """What the four models learn. UserError for pictures that the committed plan is not of."""
    plan = kept_plan(KEPT / "plans", "counterfactual", task.train)
    named = {s.name: s for s in plan.subsets}
    first, second = base_plan(task.train, (0, 1)).subsets
    return {"all": first, "seed": second} | {arm: named[name] for arm, name in RETRAINED.items()}


# ---- models


def models_of(task: AttributionTask, subsets: dict[str, Subset]) -> dict[str, TextToImage]:
    """The four models, trained where they are neither committed nor in TRUTH_DIR."""
    s, settings = task.settings, small_settings(task.settings)
    bench = RetrainingSetup(
        s.sd_model_path, s.data_dir, Path(s.truth_dir), Path(s.truth_dir), settings
    )
    todo = tuple(x for x in subsets.values() if not _is_there(task, x, settings))
    data = task.train.content_hash()
    if todo:
        retrain(bench, Trainings("cad", data, todo), WorkerSpec(train_only))
    return {arm: _model(task, subset, settings) for arm, subset in subsets.items()}


def train_only(bench: RetrainingSetup, plan: Trainings, subset: Subset) -> None:
    """One model from scratch to its checkpoint, in this process, on one thread."""
    from concept_trak.datasets.image_folder import load_folder
    from concept_trak.models.text_to_image import load_pipeline

    with as_trained():
        like, train = load_pipeline(bench.like), load_folder(bench.data).split("train")
        latents = like.encode_images(train.images(range(len(train)), like.image_size))
        trainer.train_subset(like, train, latents, subset, bench.settings, bench.work)


def _checkpoint(task: AttributionTask, subset: Subset, settings: small_model.SmallSettings) -> Path:
    work = Path(task.settings.truth_dir)
    return trainer.run_of(task.model, task.train, subset, settings, work).checkpoint


def _committed(subset: Subset, settings: small_model.SmallSettings) -> Path | None:
    """The committed model; None where there is none of these settings."""
    path = MODELS / f"{subset.name}.safetensors"
    return path if settings == small_model.SmallSettings() and path.exists() else None


def _is_there(task: AttributionTask, subset: Subset, settings: small_model.SmallSettings) -> bool:
    path = _checkpoint(task, subset, settings)
    if path.exists():
        return load_checkpoint(path)[1].get("step") == settings.steps
    return _committed(subset, settings) is not None


def _model(
    task: AttributionTask, subset: Subset, settings: small_model.SmallSettings
) -> TextToImage:
    """That of TRUTH_DIR, made on the same machine as the others, before the committed one."""
    committed = _committed(subset, settings)
    if committed and not _checkpoint(task, subset, settings).exists():
        model = small_model.load(task.model, committed)
        plan = "base" if subset.name.startswith("base-") else "counterfactual"
        refuse_unmeasured(bench_of(task), plan, subset, model)
        return model
    work = Path(task.settings.truth_dir)
    line = script_hint("cad/run_counterfactual.sh", TRUTH_DIR=work)
    return trainer.trained(task.model, task.train, subset, settings, work, line)


# ---- cells


class Cells:
    """What a model has of a concept, unedited and edited; kept in TRUTH_DIR, made once."""

    def __init__(
        self, task: AttributionTask, models: dict[str, TextToImage], judge: EmojiClassifier
    ) -> None:
        s = task.settings
        self.task, self.models, self.judge = task, models, judge
        self.plan: EditPlan = plan_of(s.selection, s.ratio, s.granularity, Operator())
        self.folder = make_folder(Path(s.truth_dir) / "cad-counterfactual")
        self.held_out = task.everything.split("held_out")
        taken = targets(task.train, KIND)
        left = [n for n in split_concepts(task.train)["report"][KIND] if n not in taken][:OTHERS]
        self.others = self._showing(left)
        self.concepts = [self._concept(name) for name in taken]
        self.base = functools.cache(self._base)

    def _showing(self, names: list[str]) -> ImageCaptionDataset:
        """One held-out picture of each."""
        of = self.held_out.column(KIND)
        rows = [of.index(name) for name in names if name in of]
        return self.held_out.subset(rows)

    def _concept(self, name: str) -> Concept:
        record = next(r for r in self.task.train.records if r[KIND] == name)
        return Concept(name, record[f"{KIND}_phrase"], self._showing([name]))

    def cell(self, arm: str, place: int) -> dict[str, Any]:
        """{state: {figure: value}} of concept number `place`; figures as they are, no shares."""
        concept, model, s = self.concepts[place], self.models[arm], self.task.settings
        at = "" if arm in ("all", "seed") else self.models["all"].weight_hash()
        decides = [model.weight_hash(), at, concept.name, concept.prompt, repr(self.plan)]
        decides += [s.score_seeds, repr((MEASURE, SAMPLING)), self.others.content_hash()]
        path = self.folder / f"{arm}-{concept.name.replace(' ', '_')}-{short_hash(decides)}.json"
        if path.exists():
            found = read_json(path, remove_hint(path))
            for state, figure in itertools.product(STATES, FIGURES):
                read_numbers(found.get(state), figure, (), path, remove_hint(path))
            return found
        log(f"{LABELS[arm]}: {concept.name}")
        found = self._measured(arm, place)
        write_json(path, found)
        return found

    def _measured(self, arm: str, place: int) -> dict[str, Any]:
        concept, model = self.concepts[place], self.models[arm]
        scores, chosen = self._scores(model, concept)
        picked = chosen.picked if arm in ("all", "seed") else self.base(place)
        unedited = {"score": held(scores, picked)} | self._figures(model, concept)
        asked, at = _asked(self, concept), replace(chosen, picked=picked)
        new = edited_values(model, at, self.plan, asked, COMPONENT_OBJECTIVES["erase"])
        with EditedNetwork(model.network) as edited:
            edited.apply(make_edit(model.network, new, picked, edited.base))
            after = {"score": 0.0} | self._figures(model, concept)
        return dict(zip(STATES, (unedited, after), strict=True))

    def _base(self, place: int) -> Picked:
        """The weights that the edit of `all` takes."""
        return self._scores(self.models["all"], self.concepts[place])[1].picked

    def _scores(self, model: TextToImage, concept: Concept) -> tuple[Scores, Selection]:
        among = select(model.network, self.plan.selection)
        scores = attribute_components(
            model, _asked(self, concept), COMPONENT_OBJECTIVES["erase"], among
        )
        return scores, choose(scores, among, self.plan.rule)

    def _figures(self, model: TextToImage, concept: Concept) -> dict[str, float]:
        asked = _asked(self, concept)
        states = [
            x
            for n in range(asked.num_seeds)
            for x in asked.states(model, COMPONENT_OBJECTIVES["erase"], n)
        ]
        judged = classifier_rates(model, concept.pictures, self.judge, MEASURE)[KIND]
        return {
            "moves": mean_value(COMPONENT_OBJECTIVES["erase"], model, states),
            "presence": self._presence(model, concept.pictures),
            "judged": float(judged.mean()),
            "others": self._presence(model, self.others),
        }

    @staticmethod
    def _presence(model: TextToImage, pictures: ImageCaptionDataset) -> float:
        if not len(pictures):
            return 0.0
        x0 = model.encode_images(pictures.images(range(len(pictures)), model.image_size))
        losses = losses_of(model, x0, pictures, MEASURE)
        return float(ConceptMeasurements(losses, {}).of_pictures(KIND).mean())


def _asked(cells: Cells, concept: Concept) -> ComponentQuery:
    return ComponentQuery(concept.prompt, "", cells.task.settings.score_seeds, SAMPLING)


def held(scores: Scores, picked: Picked) -> float:
    """Sum of alpha over chosen weights."""
    return sum(
        float(scores.mean[name].flatten()[index].double().sum()) for name, index in picked.items()
    )


# ---- the table

Values = dict[str, dict[str, dict[str, np.ndarray]]]  # arm -> state -> figure -> [concepts]


def counterfactual(task: AttributionTask) -> dict[str, Any]:
    """Train what is missing, measure, print the table, and return it as JSON."""
    subsets = subsets_of(task)
    models = models_of(task, subsets)
    cells = Cells(task, models, load_judge(JUDGE))
    places = range(len(cells.concepts))
    found = {arm: [cells.cell(arm, place) for place in places] for arm in models}
    values = {
        arm: {
            state: {f: np.array([one[state][f] for one in of]) for f in FIGURES} for state in STATES
        }
        for arm, of in found.items()
    }
    told = table_of(values) | {
        "concepts": [c.name for c in cells.concepts],
        "removed": {arm: len(s.removed) for arm, s in subsets.items()},
        "models": {arm: m.weight_hash() for arm, m in models.items()},
    }
    print(markdown(told))
    with result_folder(task.settings, "cad", "counterfactual", short_hash(told)) as folder:
        write_metrics(folder, "metrics", told, task.settings)
        write_bytes(folder / "table.md", f"{markdown(told)}\n".encode())
    return told


def table_of(values: Values) -> dict[str, Any]:
    """Rows with intervals over concepts; what retraining, and the edit, take from the figures, each
    beside `noise`, by how much the means of the two seeds differ.
    """
    usual = {f: float(x.mean()) for f, x in values["all"]["unedited"].items()}
    scale = {f: 1.0 if f == "judged" else usual[f] or 1.0 for f in FIGURES}

    def shares(arm: str, state: str) -> dict[str, np.ndarray]:
        return {f: values[arm][state][f] / scale[f] for f in FIGURES}

    rows = {
        arm: {
            state: {f: _with_interval(x) for f, x in shares(arm, state).items()} for state in STATES
        }
        for arm in values
    }
    whole = shares("all", "unedited")
    lost = {
        "retrained": _less(whole, shares("without", "unedited")),
        "retrained, beside random": _less(
            shares("random", "unedited"), shares("without", "unedited")
        ),
        "edited": _less(whole, shares("all", "edited")),
        "both": _less(whole, shares("without", "edited")),
    }
    other = shares("seed", "unedited")
    noise = {f: round(float(abs((whole[f] - other[f]).mean())), 4) for f in FIGURES}
    return {"rows": rows, "lost": lost, "noise": noise, "unit": usual}


def _less(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, Any]:
    return {f: _with_interval(before[f] - after[f]) for f in FIGURES}


def _with_interval(x: np.ndarray) -> dict[str, Any]:
    low, high = bootstrap_interval(x)
    return {"value": round(float(x.mean()), 4), "ci95": [round(low, 4), round(high, 4)]}


def markdown(told: dict[str, Any]) -> str:
    """Both tables."""

    def cells(of: dict[str, Any]) -> str:
        return " | ".join(format_interval(of[f]["value"], of[f]["ci95"]) for f in FIGURES)

    head = f"{' | '.join(FIGURES)} |\n" + "|---" * (len(FIGURES) + 1) + "|"
    lines = [f"| model | {head}"]
    for arm, of in told["rows"].items():
        for state in STATES:
            name = LABELS[arm] if state == "unedited" else f"{LABELS[arm]}, edited"
            lines.append(f"| {name} | {cells(of[state])} |")
    lines += ["", f"| lost | {head}"]
    lines += [f"| {name} | {cells(of)} |" for name, of in told["lost"].items()]
    noise = " | ".join(f"{told['noise'][f]:.2f}" for f in FIGURES)
    return "\n".join([*lines, f"| nothing, another seed | {noise} |"])
