"""Concept attribution from Python: what `from concept_trak import ...` gives.

>>> attributor = Attributor("my_images", model="CompVis/stable-diffusion-v1-4", device="cuda")
>>> attributor.fit()                                   # gradients of the images; can be resumed
>>> answer = attributor.attribute("a cat in the style of blob", concepts=["cat", "blob"])
>>> answer["cat"].top(10)                              # the images that taught the model "cat"
>>> answer.save("answers")                             # the report, a page
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .atomic_io import atomic_folder, write_json
from .attribution.answer import DEFAULT_METHOD, AttributionResult
from .attribution.methods import open_or_compute_store
from .attribution.task import AttributionTask
from .datasets.given import save_images
from .errors import UserError
from .models.device import pick_device
from .models.text_to_image import DTYPE_NAMES, from_pipeline
from .parsing import normalized
from .scoring.ranking import ranking
from .scoring.result import ConceptResult
from .settings import AMPLIFY, Settings, as_dict, provenance, resolve


class Match(NamedTuple):
    """One training image of a ranking; path: its file."""

    rank: int
    index: int
    score: float
    caption: str
    path: Path


class Attributor:
    """Attributes the concepts of one model to one set of training images.

    images: a folder with captions (data/README.md has the layouts); or a `datasets.Dataset` with
    the columns image and text; or PIL images, arrays [H, W, 3] uint8 or paths, with `captions`.
    model: folder or hub id of a Stable Diffusion 1.x or 2.x pipeline, or a loaded
    `StableDiffusionPipeline`, which is moved to `device` and frozen. folder: keeps gradients and
    answers; the same call goes on where the last one stopped. device: "cpu", "cuda:0", ...; empty:
    the first GPU, or the CPU. settings: any of docs/variables.md in small letters, over the
    defaults of `preset`.

    UserError for what cannot be used, before any gradient is computed.
    """

    def __init__(
        self,
        images: Any,
        model: Any = "CompVis/stable-diffusion-v1-4",
        folder: str | Path = "attribution",
        captions: Sequence[str] | None = None,
        device: str = "",
        preset: str = "own",
        **settings: Any,
    ) -> None:
        folder, device = Path(folder).absolute(), pick_device(device, "")
        if captions is not None or not isinstance(images, str | Path):
            images = save_images(images, captions, folder / "images")
        given = {"grad_dir": str(folder / "gradients"), "results_dir": str(folder / "answers")}
        given |= {"data_dir": str(images)}
        loaded = None if isinstance(model, str | Path) else from_pipeline(model, device)
        given["sd_model_path"] = str(model) if loaded is None else loaded.source
        if loaded is not None:
            given["dtype"] = DTYPE_NAMES[loaded.dtype]
        self._preset, self._given, self._loaded = preset, given | settings, loaded
        self.folder = folder
        self.task = AttributionTask(self._settings().on(device), device, loaded)

    def _settings(self, **changes: Any) -> Settings:
        return resolve(self._preset, self._given | changes)

    def fit(self) -> Attributor:
        """Compute a projected gradient for each training image that has none yet, with a bar; a
        run that was killed is resumed. `attribute` does so, too.
        """
        open_or_compute_store(self.task)
        return self

    def attribute(
        self, prompt: str, concepts: Sequence[str], methods: Sequence[str] = (), **settings: Any
    ) -> Answer:
        """Generate the image of `prompt`, and score every training image for each of `concepts`,
        words of the prompt.

        methods: to compare, e.g. ["das", "trak"]; they compute gradients of their own. settings: of
        this question, e.g. seed, damping, gen_guidance_scale; gradients of others (nfe, f, ...) are
        computed where there are none.
        UserError for concepts that the prompt does not hold and for settings that there are not.
        """
        from .report.write import ask

        if isinstance(concepts, str):
            raise UserError(f"concepts={concepts!r} is one text; give a list, e.g. [{concepts!r}]")
        asked = {"prompt": prompt, "target_concepts": "|".join(concepts)}
        asked |= {"methods": ",".join(methods)} | settings
        task = self.task.with_settings(self._settings(**asked).on(self.task.device))
        result, rows = ask(task, open_or_compute_store(task))
        return Answer(result, task.settings, rows)

    def edit(self, concept: str, aim: str = "erase", **settings: Any) -> ConceptEdit:
        """Find the weights that carry `concept` (CAD), and edit them in a copy of the model.

        aim: "erase", or "amplify". settings: e.g. ratio, selection, prompt, score_seeds.
        UserError for another aim, and as `ConceptEdit` tells.
        """
        if aim not in ("erase", "amplify"):
            raise UserError(f"aim={aim!r} is unknown; give aim erase or amplify")
        if aim == "amplify" and not {"selection", "ratio"} & settings.keys():
            settings = AMPLIFY | settings
        asked = self._settings(**{"concept": concept, "prompt": concept} | settings)
        return ConceptEdit(asked, self.task.device, aim, self._loaded)


class ConceptScores:
    """Scores of all training images for one concept, at the fixed damping. High: without this image
    in training the concept would be weaker.

    by_method: {method: float32 [N]}, concept_trak first. result: the scores at every damping.
    """

    def __init__(
        self, result: ConceptResult, answer: Answer, others: dict[str, np.ndarray]
    ) -> None:
        self.result, self.dataset = result, answer.result.dataset
        self._at = result.damping_index(answer.settings.damping)
        self._others = {k: v[min(self._at, len(v) - 1)] for k, v in others.items()}

    @property
    def scores(self) -> np.ndarray:
        """float32 [N]. UserError where an index was searched, which scores candidates only."""
        if self.result.told:
            raise UserError("search='index' scores candidates only; leave SEARCH out for all")
        return self.result.scores[self._at]

    @property
    def by_method(self) -> dict[str, np.ndarray]:
        return {DEFAULT_METHOD: self.scores, **self._others}

    def top(self, k: int = 10, method: str = DEFAULT_METHOD) -> list[Match]:
        """The k images with the highest scores."""
        return self._ranked(k, method, largest=True)

    def bottom(self, k: int = 10, method: str = DEFAULT_METHOD) -> list[Match]:
        """The k images with the lowest scores, the lowest first."""
        return self._ranked(k, method, largest=False)

    def _ranked(self, k: int, method: str, largest: bool) -> list[Match]:
        if method == DEFAULT_METHOD:
            rows = self.result.ranked(self._at, k, largest)
            values = self.result.scores_of(self._at, rows)
        elif method in self._others:
            rows = ranking(self._others[method], largest, k).tolist()
            values = self._others[method][rows]
        else:
            known = ", ".join([DEFAULT_METHOD, *self._others])
            raise UserError(f"method={method!r} was not asked; give method one of {known}")
        data, found = self.dataset, enumerate(zip(rows, values, strict=True), 1)
        return [Match(n, i, float(v), data.captions[i], data.path(i)) for n, (i, v) in found]


class Answer(Mapping[str, ConceptScores]):
    """{concept: its scores} of one prompt.

    image: what the model drew. warnings: what a reader must know, one sentence each. result: all
    that was computed. settings: what made it.
    """

    def __init__(self, result: AttributionResult, settings: Settings, rows: Sequence[Path]) -> None:
        self.result, self.settings, self._rows = result, settings, rows
        self.image, self.warnings = Image.fromarray(result.picture.pixels), result.warnings

    @cached_property
    def _concepts(self) -> dict[str, ConceptScores]:
        others = self.result.others
        return {
            concept.target: ConceptScores(concept, self, {k: v[:, i] for k, v in others.items()})
            for i, concept in enumerate(self.result.concepts)
        }

    def __getitem__(self, concept: str) -> ConceptScores:
        return self._concepts[normalized(concept)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __len__(self) -> int:
        return len(self._concepts)

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each concept, method and image: concept, method, index, rank,
        score, caption, file. UserError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None
        tables = []
        data = self.result.dataset
        files = [str(record["file_name"]) for record in data.records]
        for name, concept in self.items():
            for method, scores in concept.by_method.items():
                ranks = np.empty(len(scores), int)
                ranks[ranking(scores, True, len(scores))] = np.arange(1, len(scores) + 1)
                columns = {"index": np.arange(len(scores)), "rank": ranks, "score": scores}
                columns |= {"caption": data.captions, "file": files}
                tables.append(pandas.DataFrame({"concept": name, "method": method, **columns}))
        return pandas.concat(tables, ignore_index=True)

    def save(self, folder: str | Path = "") -> Path:
        """Write report.html with the files beside it, in a folder of their own below `folder`
        (default: that of the attributor); returns the page's path.
        """
        from .report.write import write_answer

        s = self.settings
        s = s.but(results_dir=str(Path(folder).absolute())) if folder else s
        return write_answer(self.result, s, self._rows)


class ConceptEdit:
    """A copy of the model without (or with more of) a concept.

    pipe: the edited `StableDiffusionPipeline`, to generate with. scores: of all components. chosen:
    how many weights of how many were changed. Used in a `with` block, the edit is undone at its
    end.
    UserError for a concept that labelled data do not know, and a ratio that chooses no weight.
    """

    def __init__(self, settings: Settings, device: str, aim: str, loaded: Any = None) -> None:
        from .report.component_report import ComponentRun

        self.settings, model = settings, None
        if loaded is not None:  # the given pipeline itself stays as it is
            model = from_pipeline(copy.deepcopy(loaded.pipe).to(torch.float32), device)
        self._run = ComponentRun(settings, device, model)
        self.pipe = self._run.model.pipe
        self.scores = self._run.scores(aim)
        self.edit, self.chosen = self._run.edit(self.scores)

    def undo(self) -> None:
        """Give the pipeline its own weights back, to the bit."""
        self._run.edited.undo()

    def __enter__(self) -> ConceptEdit:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def save(self, folder: str | Path) -> Path:
        """Write the edit (edit.safetensors, edit.json), for EDITS; returns the folder."""
        from .components.edits import save_edit

        with atomic_folder(Path(folder)) as made:
            save_edit(made / "edit.safetensors", self.edit)
            facts = {"settings": as_dict(self.settings), "provenance": provenance()}
            write_json(made / "edit.json", facts | {"digest": self.edit.digest()})
        return Path(folder)

    def export(self, folder: str | Path) -> Path:
        """Write the edited pipeline as a folder for diffusers; returns it."""
        from .report.component_report import check_export

        check_export(self.settings, Path(folder))
        self._run.export(Path(folder))
        return Path(folder)
