"""The methods of the small AbC that are its own; beside them every ranker of `attribution.methods`.

| method | train rows | query |
|---|---|---|
| ablation_0 | dsm | whole picture |
| ablation_1 | dsm | concept |
| ablation_2 | dps | concept |
| ablation_3 | dps at inverted states | concept |
| ablation_4 | dps at inverted states, unit norm | concept |
| dps_attention | dps, unit norm, of all attention | concept |
| blindfold | the same, every picture without its caption | concept |

States are noisings unless inverted. The ablation is the paper's: TRAK, + concept query, + DPS train
gradient, + DDIM inversion, + unit norm; its last step is the paper's method. `blindfold` gives
every row the empty caption, so that a caption can neither help nor give away who has none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from concept_trak.attribution.methods import open_or_compute_store
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError
from concept_trak.registry import RANKERS, unknown
from experiments.benchmark.evaluate import is_baseline

if TYPE_CHECKING:
    from concept_trak.attribution.attributors import GradientAttributor
    from concept_trak.attribution.task import AttributionTask

ABLATION = tuple(f"ablation_{i}" for i in range(5))
ALL_ATTENTION = {"layer": "attn1|attn2", "f": "dps"}


@dataclass(frozen=True)
class Method:
    """settings: what it changes in the settings. per_concept: see `GradientAttributor`. blindfold:
    every train picture under the empty caption.
    """

    name: str
    settings: dict[str, Any]
    per_concept: bool = True
    blindfold: bool = False

    def task(self, task: AttributionTask) -> AttributionTask:
        """The pictures and settings of its train rows."""
        own = without_captions(task) if self.blindfold else task
        wider = 2 if "layer" in self.settings else 1  # twice the modules, as many features for each
        dim = wider * own.settings.proj_dim
        return own.with_settings(own.settings.but(**self.settings, proj_dim=dim))

    def __call__(self, task: AttributionTask) -> GradientAttributor:
        """Its ranker; computes train rows that are not there yet."""
        from concept_trak.attribution.attributors import GradientAttributor

        own = self.task(task)
        return GradientAttributor(own, open_or_compute_store(own), self.per_concept)


def without_captions(task: AttributionTask) -> AttributionTask:
    """The same pictures, each under the empty caption."""
    data, shown = copy.copy(task.data), task.train
    data.pictures = ImageCaptionDataset(shown.root, shown.records, [""] * len(shown))
    return task.with_data(data)


def _rows(f: str, normalize: bool = False, inversion: bool = False) -> dict[str, Any]:
    return {"f": f, "normalize": normalize, "ddim_inversion": inversion}


METHODS = {
    method.name: method
    for method in (
        Method("ablation_0", _rows("dsm"), per_concept=False),
        Method("ablation_1", _rows("dsm")),
        Method("ablation_2", _rows("dps")),
        Method("ablation_3", _rows("dps", inversion=True)),
        Method("ablation_4", _rows("dps", True, inversion=True)),
        Method("dps_attention", ALL_ATTENTION),
        Method("blindfold", ALL_ATTENTION, blindfold=True),
    )
}
COMPARED = ("concept_trak", "contrast", "trak", "d_trak", "das", *METHODS)  # METHODS empty


def method(name: str) -> Any:
    """What makes the method's ranker of a task. UserError for a name that there is not."""
    rivals = [n for n in RANKERS.names() if not is_baseline(n)]
    if name in METHODS:
        return METHODS[name]
    if name not in rivals:
        raise UserError(unknown("METHODS", name, tuple(dict.fromkeys([*rivals, *METHODS]))))
    return RANKERS.get(name)
