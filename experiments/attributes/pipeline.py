"""From nothing to rows: pictures, models, the classifier. Each stage keeps what it finished, and
goes on where it was killed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.atomic_io import write_json
from concept_trak.attribution.task import AttributionTask
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.models.class_conditional import Architecture, made_from
from concept_trak.registry import RANKERS
from concept_trak.settings import Settings

from . import celeba, faces, shapes
from .model.classifier import Classifier, ClassifierSettings, train_classifier
from .model.train import TrainingJob, TrainSettings, train
from .queries import LabelledBenchmark, QuerySettings
from .schemes import AttributeScheme, is_made_from, labels_of, load_labelled
from .settings import AttributeSettings

COMBINATION_SEED = 0  # draws which combinations are asked about where there are many


@dataclass(frozen=True)
class TrainedModel:
    """One of the models of a bench."""

    network: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.network}-{self.seed}"


class AttributeBenchmark:
    """Everything of one bench. settings: how rows and queries are made; device: where."""

    def __init__(self, own: AttributeSettings, settings: Settings, device: str) -> None:
        self.own, self.settings, self.device = own, settings, device

    @property
    def data_dir(self) -> Path:
        """Folder of the pictures."""
        return self.own.folder / "data"

    @cached_property
    def labelled(self) -> tuple[ImageCaptionDataset, AttributeScheme]:
        """All pictures. UserError while they are not there."""
        if not (self.data_dir / "metadata.jsonl").is_file():
            line = self.own.line("generate")
            raise UserError(f"{self.data_dir} has no pictures; make them: {line}")
        again = f"remove it and make it again: rm -r {shlex.quote(str(self.data_dir))}; "
        return load_labelled(self.data_dir, again + self.own.line("generate"))

    @property
    def models(self) -> list[TrainedModel]:
        """Every network with every seed."""
        networks = [n.strip() for n in self.own.networks.split(",") if n.strip()]
        if not networks:
            raise UserError("NETWORKS is empty; set NETWORKS to unet, dit or unet,dit")
        return [TrainedModel(n, seed) for n in networks for seed in self.own.seed_list()]

    def architecture(self, network: str) -> Architecture:
        """Sizes of a network. UserError for one that there is not."""
        o = self.own
        widths = {"unet": (o.unet_width, o.unet_depth), "dit": (o.dit_width, o.dit_depth)}
        if network not in widths:
            raise UserError(
                f"NETWORKS names {network!r}; set NETWORKS to some of {', '.join(widths)}"
            )
        width, depth = widths[network]
        return Architecture(network, o.size, o.patch, width, depth)

    def job(self, model: TrainedModel) -> TrainingJob:
        """Its training on all pictures."""
        data, scheme = self.labelled
        part, o = data.split("train"), self.own
        how = TrainSettings(steps=o.steps, batch=o.batch, lr=o.lr)
        architecture = self.architecture(model.network)
        kept = np.ones(len(part), dtype=bool)
        return TrainingJob(model.name, scheme, part, kept, architecture, how, model.seed)

    def model_dir(self, model: TrainedModel) -> Path:
        """Where it is when it is finished."""
        return self.own.folder / "models" / model.name

    # ---- stages

    def generate(self) -> None:
        """The pictures. Those that were made from other settings are left alone, and refused."""
        maker = {"synthetic": make_synthetic, "faces": make_faces, "celeba": make_celeba}
        make_of, made = maker[self.own.data](self.own, self.data_dir)
        if is_made_from(self.data_dir, made):
            return
        if (self.data_dir / "metadata.jsonl").exists():
            line = replace(self.own, work="another_folder").line("generate")
            raise UserError(
                f"{self.data_dir} was made from other settings; remove it, or use another: {line}"
            )
        make_of()

    def train(self) -> None:
        """Every model that is not there yet."""
        for model in self.models:
            job, folder = self.job(model), self.model_dir(model)
            known = made_from(folder)
            if known == job.identity():
                continue
            if known:
                line = replace(self.own, work="another_folder").line("train")
                raise UserError(
                    f"{folder} was trained with other settings or pictures; remove it, or use "
                    f"another: {line}"
                )
            trained = train(job, self.own.folder / "trainings", self.device)
            trained.save(folder, job.identity())

    @cached_property
    def classifier(self) -> Classifier:
        """Trained if it is not there; it reads the pictures of its own split."""
        data, scheme = self.labelled
        work, size = self.own.folder / "classifier", self.own.size
        return train_classifier(data.split("classifier"), scheme, size, self.checks, work)

    @property
    def checks(self) -> ClassifierSettings:
        """How it is trained: as long as the models, at most."""
        default = ClassifierSettings()
        return ClassifierSettings(steps=min(default.steps, self.own.steps))

    def classify(self) -> dict[str, Any]:
        """{"real": accuracy on held-out pictures, model: {split: share of drawings read as asked}};
        kept beside the models.
        """
        data, scheme = self.labelled
        held_out = data.split("held_out")
        pixels = held_out.images(range(len(held_out)), self.own.size)
        indices = scheme.vocabulary.indices(labels_of(scheme, held_out)).numpy()
        right = self.classifier.right(pixels, indices)
        found: dict[str, Any] = {"real": round(float(right.mean()), 4)}
        for model in self.models:
            benchmark = self.benchmark(self.task(model))
            assert benchmark.pictures
            found[model.name] = {k: round(v, 4) for k, v in benchmark.drawn.items()}
        write_json(self.own.folder / "classified.json", found)
        return found

    def rows(self) -> None:
        """The train rows of every ranker that has some."""
        for model in self.models:
            task = self.task(model)
            for name in self.rankers_of(model):
                RANKERS.get(name)(task)

    # ---- what stages share

    @property
    def rankers(self) -> list[str]:
        """METHODS and the controls; by default recipe reference, too."""
        from experiments.benchmark.evaluate import chosen_rankers

        named = chosen_rankers(self.settings.methods)
        return named if self.settings.methods else ["reference", *named]

    def rankers_of(self, model: TrainedModel) -> list[str]:
        """Those asked of one model; see `AttributeSettings.reference_seeds`."""
        asked = self.own.has_reference(model.seed)
        return [name for name in self.rankers if asked or name != "reference"]

    def task(self, model: TrainedModel, scope: str = "local") -> AttributionTask:
        """A model and the pictures. UserError while it is not trained."""
        folder = self.model_dir(model)
        if not made_from(folder):
            raise UserError(f"{folder} is not there; train it: {self.own.line('train')}")
        places = {
            "sd_model_path": str(folder),
            "data_dir": str(self.data_dir),
            "grad_dir": str(self.own.folder / "grads" / model.name),
            "results_dir": str(self.own.folder / "qual" / model.name),
        }
        return AttributionTask(self.settings.but(**places, scope=scope), self.device)

    def benchmark(self, task: AttributionTask) -> LabelledBenchmark:
        """Its questions on a model."""
        keep = self.own.folder / "drawings"
        asked = QuerySettings(
            self.combinations, self.own.samples, self.own.tune, self.classifier, keep
        )
        return LabelledBenchmark(task, asked)

    @cached_property
    def combinations(self) -> list[dict[str, str]]:
        """Those asked about: all, or where there are more than `most` one of each held-out pair
        and others drawn with a fixed seed.
        """
        _, scheme = self.labelled
        everything = scheme.combinations()
        if len(everything) <= self.own.most:
            return everything
        rng = np.random.default_rng(COMBINATION_SEED)
        order = [everything[i] for i in rng.permutation(len(everything))]
        out = [labels for labels in order if scheme.is_held_out(labels)]
        seen = [labels for labels in order if not scheme.is_held_out(labels)]
        half = self.own.most // 2
        return out[:half] + seen[: self.own.most - min(half, len(out))]


Maker = tuple[Callable[[], None], dict[str, Any]]  # (makes the folder, what it is made from)


def make_synthetic(own: AttributeSettings, root: Path) -> Maker:
    """Shapes x colours."""
    settings = shapes.SyntheticSettings(
        shapes=words(own.shapes),
        colors=words(own.colors),
        held_out=own.held_out,
        size=own.size,
        count=own.count,
    )
    return lambda: shapes.build(root, settings), plain(asdict(settings))


def make_faces(own: AttributeSettings, root: Path) -> Maker:
    """Drawn faces."""
    settings = faces.FaceSettings(words(own.attributes), own.held_out, own.size, own.count)
    return lambda: faces.make(root, settings), plain(asdict(settings))


def make_celeba(own: AttributeSettings, root: Path) -> Maker:
    """CelebAMask-HQ as it was downloaded."""
    settings = celeba.CelebaSettings(
        own.source, words(own.attributes), own.held_out, own.size, own.count
    )
    return lambda: celeba.make(root, settings), plain(asdict(settings))


def words(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
