"""The methods as data: which train rows, which query states and cotangent, which row weight. A new
method is one entry.

| method | train cotangent | unit norm | row weight | query cotangent | source |
|---|---|---|---|---|---|
| concept_trak | the settings' `f` | `normalize` | 1 | slider, one row a concept | Concept-TRAK (ICLR 2026) |
| trak | dsm | no | 1 | dsm of the whole picture | Park et al. 2023; Zheng et al. 2024, "TRAK" |
| d_trak | dtrak | no | 1 | dtrak of the whole picture | Zheng et al. 2024 |
| das | das | yes | summed residual | das of the whole picture | Lin et al. 2025, in Concept-TRAK's L1 form |

All read the same projection of the same parameters at the same states q(x_t | x0) unless the
settings ask for an inversion.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..settings import Settings


@dataclass(frozen=True)
class Method:
    """What distinguishes a method; f = None keeps the settings' objective, states and
    normalisation.
    """

    f: str | None
    normalize: bool = False
    residual_weight: bool = False
    per_concept: bool = False  # has a query row for each concept, not one for the whole picture


METHODS = {
    "concept_trak": Method(None, per_concept=True),
    "trak": Method("dsm"),
    "d_trak": Method("dtrak"),
    "das": Method("das", normalize=True, residual_weight=True),
}


def settings_for(method: Method, settings: Settings) -> Settings:
    """The settings of a method's train rows: rivals keep model, layer, states' number and
    projection.
    """
    if method.f is None:
        return settings
    return dataclasses.replace(
        settings, f=method.f, normalize=method.normalize, ddim_inversion=False, recipe="default"
    )
