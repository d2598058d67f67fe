"""LDS and counterfactual on labelled pictures: `experiments.truth` on class-conditional models.

lds              subsets of which each concept keeps a rate of its own, each trained with two seeds
counterfactual   without the union of what a ranker names for the "report" concepts of a kind, each
                 with two seeds; removed: as many as show the rarest of them

Rankers are asked on the model of all pictures, about held-out pictures as they are. Half of the
concepts ("tune") choose the dampings, the others are reported, as in the bench of truth; ours has
the damping of the settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from concept_trak.attribution.methods import swept
from concept_trak.attribution.question import QueryImage
from concept_trak.attribution.task import AttributionTask
from concept_trak.errors import UserError
from concept_trak.models.class_conditional import Architecture
from concept_trak.parsing import parse_methods
from concept_trak.registry import RANKERS
from experiments.truth import counterfactual, lds
from experiments.truth.concept_likelihood import ClassifierRates
from experiments.truth.queries import ConceptQueries
from experiments.truth.setup import OURS, damping_of, keep_plan
from experiments.truth.subsets import (
    RetrainingPlan,
    base_plan,
    counterfactual_plan,
    kept_plan,
    kinds_of,
    lds_plan,
    split_concepts,
)
from experiments.truth.train_many import WorkerSpec, load_measurements, retrain

from .concept_likelihood import ClassConditionalSetup, read_presences, train_and_measure
from .model.train import TrainSettings, finished, train
from .pipeline import AttributeBenchmark
from .queries import questions_of

SEEDS = (0, 1)
WORK = WorkerSpec(train_and_measure, a_process=None, model_gb=0.9, checkpoint_mb=6)


class RetrainingBenchmark:
    """The bench of truth of a bench of labelled pictures, on small models."""

    def __init__(self, bench: AttributeBenchmark) -> None:
        self.bench = bench
        self.took: dict[str, float] = {}
        self.data, self.held_out = (bench.labelled[0].split(s) for s in ("train", "held_out"))
        own = bench.own
        self.network = own.truth_network
        kept = own.folder / "truth" if own.quick else own.kept / own.bench
        self.plans = kept / "plans"
        self.models = ClassConditionalSetup(
            str(bench.data_dir),
            own.folder / "retrainings",
            kept / "presences",
            own.folder / "classifier",
            Architecture(self.network, own.size, own.truth_patch, own.truth_width, own.truth_depth),
            TrainSettings(
                steps=own.truth_steps, batch=own.truth_batch, lr=own.truth_lr, save_every=10_000
            ),
            checks=bench.checks,
        )

    def plan(
        self, name: str, make: Callable[[], RetrainingPlan], arms: Sequence[str] = ()
    ) -> RetrainingPlan:
        """The plan kept, or with RETRAIN=1 made; with RETRAIN=1 it gets the `arms` that it lacks,
        and what is missing is trained.
        """
        if self.bench.settings.retrain:
            keep_plan(self.plans / f"{name}.json", self.data, make, arms)
            assert self.bench.classifier  # trained once, before the models measured by it
            retrain(self.models, kept_plan(self.plans, name, self.data), WORK)
        return kept_plan(self.plans, name, self.data)

    def found(self, plan: RetrainingPlan, least: int) -> tuple[RetrainingPlan, dict[str, Any]]:
        """(the measured part of a plan, its presences). UserError for fewer than `least`."""
        there = [s for s in plan.subsets if self.models.presences(plan.name, s).exists()]
        if len(there) < least:
            of = f"{len(there)} of {len(plan.subsets)} models of the plan {plan.name}"
            line = self.bench.own.line(plan.name, RETRAIN=1)
            raise UserError(f"{of} have presences; train them: {line}")
        part = replace(plan, subsets=tuple(there))
        return part, load_measurements(self.models, part, self.held_out, read_presences)

    # ---- what rankers say

    @cached_property
    def task(self) -> AttributionTask:
        """The model of all pictures, trained as those of the plans are."""
        subset = base_plan(self.data, SEEDS[:1]).subsets[0]
        job, work = self.models.job(subset), self.models.work
        model = finished(job, work) or train(job, work)
        folder = self.bench.own.folder / "models" / f"truth-{self.network}"
        model.save(folder, job.identity())
        s = self.bench.settings.but(
            sd_model_path=str(folder),
            data_dir=str(self.bench.data_dir),
            grad_dir=str(self.bench.own.folder / "grads" / folder.name),
            scope="local",
        )
        return AttributionTask(s, self.bench.device)

    @cached_property
    def asked(self) -> ConceptQueries:
        """Every concept of every held-out picture."""
        model, content = self.task.model, self.held_out.content_hash()
        pixels = self.held_out.images(range(len(self.held_out)), model.image_size)
        questions, of = [], {kind: {} for kind in kinds_of(self.held_out)}
        latents = model.encode_images(pixels).split(1)
        for row, (x0, shown) in enumerate(zip(latents, pixels, strict=True)):
            caption = self.held_out.captions[row]
            picture = QueryImage(caption, x0, None, shown, {"real": [content, row]})
            form = self.task.settings.query_form
            for question in questions_of(form, model.vocabulary, picture):
                of[question.concept].setdefault(question.words, []).append(len(questions))
                questions.append(question)
        return ConceptQueries(questions, of)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """{ranker: [D, Q, N]}."""
        found = {}
        for name in self.bench.rankers:
            begun = time.perf_counter()
            found[name] = swept(RANKERS.get(name)(self.task), self.asked.questions)
            self.took[name] = time.perf_counter() - begun
        return found

    def seconds(self) -> dict[str, float]:
        """{ranker: of a question, its train rows included}, as this run took them: rows that were
        there before cost nothing.
        """
        return {name: took / len(self.asked.questions) for name, took in self.took.items()}

    def damping(self, name: str, truths: dict[str, lds.GroundTruth]) -> int:
        """Index of a ranker's: chosen by LDS on the "tune" concepts."""
        values, tune = self.scores[name], split_concepts(self.data)["tune"]
        choose = lambda: lds.best_damping(values, self.asked, truths, tune)  # noqa: E731
        return damping_of(name, self.task, values, choose)

    # ---- LDS

    def lds_plan(self) -> RetrainingPlan:
        """`lds_subsets` subsets, each with two seeds."""
        count = self.bench.own.lds_subsets
        return self.plan("lds", lambda: lds_plan(self.data, count, count))

    @cached_property
    def measured(self) -> tuple[RetrainingPlan, dict[str, Any]]:
        """(measured part of the LDS plan, its presences)."""
        return self.found(self.lds_plan(), 3)

    def truths(self, drawn: bool = False) -> dict[str, lds.GroundTruth]:
        """{kind: what retraining says, mean over the seeds of each subset}: presences, or with
        `drawn` the classifier's rates.
        """
        part, found = self.measured
        found = {n: ClassifierRates(p) for n, p in found.items()} if drawn else found
        first = [s for s in part.subsets if s.seed == part.subsets[0].seed]
        second = [s for s in part.subsets if s.seed != part.subsets[0].seed]
        parts = [replace(part, subsets=tuple(first))]
        if len(second) == len(first):
            parts.append(replace(part, subsets=tuple(second)))
        told = {}
        for kind in kinds_of(self.data):
            each = [lds.measured(p, found, self.data, self.held_out, kind) for p in parts]
            mean = np.mean([m.presences for m in each], 0)
            told[kind] = replace(each[0], presences=mean)
        return told

    def lds_table(self) -> dict[str, Any]:
        """{ranker: {"lds", "partial", intervals, "drawn": the same}} over the "report" concepts of
        all kinds; drawn: against the classifier's rates instead of presences.
        """
        part, found = self.measured
        both = {"": self.truths(), "drawn": self.truths(drawn=True)}
        table: dict[str, Any] = {}
        for name, values in self.scores.items():
            told = {key: self.lds_of(name, values, truths) for key, truths in both.items()}
            table[name] = {**told[""], "drawn": told["drawn"]}
        drawn = {n: ClassifierRates(p) for n, p in found.items()}
        table["ceiling"] = self.ceiling(part, found)
        table["ceiling_drawn"] = self.ceiling(part, drawn)
        table["subsets"] = len(both[""][kinds_of(self.data)[0]].kept)
        table["models"] = len(part.subsets)
        return table

    def lds_of(
        self, name: str, values: np.ndarray, truths: dict[str, lds.GroundTruth]
    ) -> dict[str, Any]:
        """Figures of one ranker at its damping; values [D, Q, N]."""
        d = self.damping(name, truths)
        parts = []
        for kind, names in split_concepts(self.data)["report"].items():
            scores = self.asked.mean(values[[d]], kind, names)[0]
            parts.append(lds.lds_metrics(scores, truths[kind].of(names)))
        return lds.summary({k: np.concatenate([p[k] for p in parts]) for k in parts[0]})

    def ceiling(self, part: RetrainingPlan, found: dict[str, Any]) -> float | None:
        """Mean correlation of two seeds over the "report" concepts; None while fewer than three
        subsets have both.
        """
        report = split_concepts(self.data)["report"]
        try:
            each = [
                lds.seed_agreement(part, found, self.held_out, k, names)
                for k, names in report.items()
            ]
        except UserError:
            return None
        return round(float(np.concatenate(each).mean()), 4)

    # ---- counterfactual

    def counterfactual_table(self) -> dict[str, Any]:
        """{kind: {arm: drops}, "noise", "targets"}."""
        bases = self.plan("base", lambda: base_plan(self.data, SEEDS))
        named = parse_methods(self.bench.settings.methods)
        plan = self.plan("counterfactual", self.planned, named)
        bases, whole = self.found(bases, 1)
        by_seed = {s.seed: whole[s.name] for s in bases.subsets}
        part, found = self.found(plan, 1)
        told: dict[str, Any] = counterfactual.presence_drops(
            part, found, by_seed, self.data, self.held_out, OURS
        )
        told["noise"] = counterfactual.seed_noise(by_seed, self.data, self.held_out)
        told["targets"] = {k: counterfactual.targets(self.data, k) for k in kinds_of(self.data)}
        return told

    def planned(self) -> RetrainingPlan:
        """What every ranker names on the model of all pictures; dampings are those of the LDS where
        it was measured, else those of the settings.
        """
        try:
            truths = self.truths()
        except UserError:
            truths = {}
        arms: dict[str, list[int]] = {}
        for kind in kinds_of(self.data):
            names = counterfactual.targets(self.data, kind)
            scores = {}
            for name, values in self.scores.items():
                d = self.damping(name, truths) if truths else self.fixed(values)
                scores[name] = self.asked.mean(values[[d]], kind, names)[0]
            arms |= counterfactual.removal_sets(self.data, kind, scores, OURS)
        return counterfactual_plan(self.data, arms, SEEDS)

    def fixed(self, values: np.ndarray) -> int:
        """Index of the settings' damping, for every ranker."""
        return damping_of(OURS, self.task, values, lambda: 0)
