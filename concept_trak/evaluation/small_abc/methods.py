"""The methods that the small AbC compares.

| method | train rows | query |
|---|---|---|
| concept_trak | the settings' F, weighted by the caption's fit | concept |
| contrast | the same without the weights | concept |
| trak, d_trak, das | dsm, dtrak, das (unit norm, weighted) | whole picture |
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
from typing import Any

from ...attribution.corpus import Corpus
from ...attribution.rankers import GradientRanker
from ...datasets.folder import ImageCaptionDataset
from ..rankers import train_store

ABLATION = tuple(f"ablation_{i}" for i in range(5))
ALL_ATTENTION = {"layer": "attn1|attn2", "f": "dps"}


@dataclass(frozen=True)
class Method:
    """settings: what it changes in the settings. per_concept: see `GradientRanker`. weighted:
    whether the weights of its objective count. blindfold: every train picture under the empty
    caption.
    """

    name: str
    settings: dict[str, Any]
    per_concept: bool = True
    blindfold: bool = False
    weighted: bool = True

    def corpus(self, corpus: Corpus) -> Corpus:
        """The pictures and settings of its train rows."""
        own = blindfolded(corpus) if self.blindfold else corpus
        wider = 2 if "layer" in self.settings else 1  # twice the modules, as many features for each
        dim = wider * own.settings.proj_dim
        return own.with_settings(own.settings.but(**self.settings, proj_dim=dim))

    def ranker(self, corpus: Corpus) -> GradientRanker:
        """With its train rows, computed where they are not there yet."""
        own = self.corpus(corpus)
        return GradientRanker(own, train_store(own), self.per_concept)


def blindfolded(corpus: Corpus) -> Corpus:
    """The same pictures, each under the empty caption."""
    other, data = copy.copy(corpus), copy.copy(corpus.data)
    for name in ("cond_null", "parameters", "projection"):
        other.__dict__.pop(name, None)
    shown = corpus.train
    data.pictures = ImageCaptionDataset(shown.root, shown.records, [""] * len(shown))
    other.data = data
    return other


def _rows(f: str, normalize: bool = False, inversion: bool = False) -> dict[str, Any]:
    return {"f": f, "normalize": normalize, "ddim_inversion": inversion}


METHODS = {
    method.name: method
    for method in (
        Method("concept_trak", {}),
        Method("contrast", {}, weighted=False),
        Method("trak", _rows("dsm"), per_concept=False),
        Method("ablation_0", _rows("dsm"), per_concept=False),
        Method("ablation_1", _rows("dsm")),
        Method("ablation_2", _rows("dps")),
        Method("ablation_3", _rows("dps", inversion=True)),
        Method("ablation_4", _rows("dps", True, inversion=True)),
        Method("dps_attention", ALL_ATTENTION),
        Method("blindfold", ALL_ATTENTION, blindfold=True),
        Method("d_trak", _rows("dtrak"), per_concept=False),
        Method("das", _rows("das", True), per_concept=False),
    )
}
