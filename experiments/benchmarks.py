"""The benchmarks of this repository."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from concept_trak.registry import BENCHMARKS
from concept_trak.settings import ROOT

if TYPE_CHECKING:
    from concept_trak.attribution.question import Query, QueryImage
    from concept_trak.attribution.task import AttributionTask

CELL_SEED = 0  # draws which seen cells are asked about


@BENCHMARKS.register("emoji")
class Emoji:
    """Object and style of the embedded model's pictures.

    Queries: every held-out (object, style) cell (ood), as many seen cells (id), and other seen ones
    that choose the damping (tune). NUM_QUERIES (0: all) bounds the first two. Their pictures are
    `generate`, all from the same x_T, or the `real` ones of the data.
    """

    concepts: ClassVar[tuple[str, ...]] = ("object", "style")
    kinds: ClassVar[tuple[str, ...]] = ("generated", "real")
    splits: ClassVar[tuple[str, ...]] = ("ood", "id")
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, task: AttributionTask) -> None:
        self.task = task
        self._relevant: dict[str, np.ndarray] = {}

    @cached_property
    def cells(self) -> dict[str, list[int]]:
        """{split: rows of the whole data}; seen cells are drawn with a fixed seed, disjointly."""
        records = self.task.everything.records
        held_out, seen = (
            [i for i, r in enumerate(records) if r.get("split") == split]
            for split in ("held_out", "train")
        )
        shuffle = np.random.default_rng(CELL_SEED)
        ood, seen = shuffle.permutation(held_out).tolist(), shuffle.permutation(seen).tolist()
        n = self.task.settings.num_queries or len(ood)
        tune = seen[len(ood) : len(ood) + max(8, n // 3)]
        return {"ood": ood[:n], "id": seen[:n], "tune": tune}

    def questions(self, kind: str) -> dict[str, list[Query]]:
        """See `Benchmark.questions`."""
        pictures = dict(zip(self._rows, getattr(self, f"_{kind}"), strict=True))
        return {
            split: [question for row in rows for question in self._of_cell(row, pictures[row])]
            for split, rows in self.cells.items()
        }

    def relevant(self, question: Query) -> np.ndarray:
        """See `Benchmark.relevant`."""
        from concept_trak.datasets.labels import relevant

        if question.words not in self._relevant:
            self._relevant[question.words] = relevant(self.task.train, question.words)
        return self._relevant[question.words]

    def _of_cell(self, row: int, picture: QueryImage) -> list[Query]:
        from concept_trak.attribution.prompts import contrast_prompts
        from concept_trak.attribution.question import Query

        record, form = self.task.everything.records[row], self.task.settings.query_form
        words = [record[f"{concept}_phrase"] for concept in self.concepts]
        return [
            Query(picture, word, plus, minus, concept)
            for concept, word, (plus, minus) in zip(
                self.concepts, words, contrast_prompts(form, picture.prompt, words), strict=True
            )
        ]

    @cached_property
    def _rows(self) -> list[int]:
        return [row for rows in self.cells.values() for row in rows]

    @cached_property
    def _generated(self) -> list[QueryImage]:
        from concept_trak.attribution.question import generate

        task = self.task
        captions = [task.everything.captions[row] for row in self._rows]
        return generate(task.model, task.settings, captions, task.settings.seed)

    @cached_property
    def _real(self) -> list[QueryImage]:
        from concept_trak.attribution.question import QueryImage

        data, model = self.task.everything, self.task.model
        pixels = data.images(self._rows, size=model.image_size)
        latents, content = model.encode_images(pixels).split(1), data.content_hash()
        return [
            QueryImage(data.captions[row], x0, None, shown, {"real": [content, row]})
            for x0, shown, row in zip(latents, pixels, self._rows, strict=True)
        ]


LABELLED = {  # models of evaluation/labelled: small, on pixels
    "layer": "weight",  # all weights, as the paper's; no rule for tables and biases is needed
    "gen_guidance_scale": 2.0,
    "gen_num_inference_steps": 25,
    "scope": "local",
    "nfe": 5,
    "epochs": 4,
    "num_split": 2,
    "batch_size": 32,
}


def labelled(bench: str, home: str, network: str = "unet") -> type:
    """A benchmark of `experiments.attributes` by its name; its models are made by its scripts.

    It is asked here on one model, `SD_MODEL_PATH`; `concept-trak labelled` asks on all.
    """
    folder = ROOT / "experiments" / home / "results" / bench

    class Labelled:
        settings: ClassVar[dict[str, Any]] = LABELLED | {
            "data_dir": str(folder / "data"),
            "sd_model_path": str(folder / "models" / f"{network}-0"),
            "grad_dir": str(folder / "grads" / f"{network}-0"),
            "results_dir": str(folder / "qual"),
            "truth_dir": str(folder / "retrainings"),
        }

        def __new__(cls, task: AttributionTask) -> Any:
            from experiments.attributes.queries import LabelledBenchmark

            return LabelledBenchmark(task)

    return Labelled


for name, home in (
    ("synthetic", "synthetic"),
    ("synthetic_4x4", "synthetic"),
    ("faces", "faces"),
    ("celeba_hq", "celeba_hq"),
):
    BENCHMARKS.add(name, labelled(name, home))
