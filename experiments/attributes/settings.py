"""Every default of the benchmarks of labelled pictures; a bench says where it departs.

of_bench("faces", {"steps": 100})  ->  LabelledSettings
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from concept_trak.errors import UserError, script_hint
from concept_trak.parsing import parse_numbers
from concept_trak.settings import ROOT

STAGES = ("generate", "train", "classify", "rows", "attribute", "table")
TRUTHS = ("lds", "counterfactual")  # on request: they train models again
SCOPES = ("local", "global")


@dataclass(frozen=True)
class AttributeSettings:
    """What a bench is. UserError for a number out of range.

    data: which pictures: synthetic, faces or celeba. networks: trained and asked. seeds: of
    trainings. reference_seeds: of those that recipe reference is asked of, most of the cost.
    samples, tune: drawings of a combination that are asked about, that choose dampings. source:
    folder of CelebAMask-HQ. shapes, colors: of synthetic pictures. attributes: of faces, empty:
    all. most: combinations asked about at most, the held-out ones among them. truth_*: of the
    models that are trained again and again.
    """

    bench: str = "synthetic"
    data: str = "synthetic"
    networks: str = "unet,dit"
    seeds: str = "0-2"
    reference_seeds: str = "0-2"
    samples: int = 16
    tune: int = 4
    most: int = 16
    count: int = 600
    size: int = 16
    patch: int = 2
    unet_width: int = 24
    unet_depth: int = 1
    dit_width: int = 48
    dit_depth: int = 3
    steps: int = 600
    batch: int = 32
    lr: float = 3e-3
    shapes: str = "triangle,circle"
    colors: str = "red,blue"
    held_out: str = "triangle red"
    attributes: str = ""
    source: str = ""
    lds_subsets: int = 64
    truth_network: str = "dit"
    truth_patch: int = 4
    truth_width: int = 64
    truth_depth: int = 2
    truth_steps: int = 400
    truth_batch: int = 24
    truth_lr: float = 5e-3
    work: str = ""
    quick: bool = False

    def __post_init__(self) -> None:
        low = {"samples": 1, "tune": 1, "most": 1, "steps": 1, "batch": 1, "size": 8}
        low["count"] = 0 if self.data == "celeba" else 1
        for name, least in (low | {"lds_subsets": 3, "truth_steps": 1}).items():
            if not getattr(self, name) >= least:
                value = getattr(self, name)
                told = f"{name.upper()}={value} is out of range"
                raise UserError(f"{told}; set {name.upper()} to at least {least}")
        parse_numbers("SEEDS", self.seeds, 1000, "seeds")
        parse_numbers("REFERENCE_SEEDS", self.reference_seeds, 1000, "seeds")

    @property
    def folder(self) -> Path:
        """Where everything of the bench goes that is not committed."""
        within = Path(self.work or ROOT / "experiments" / self.home / "results")
        return within / (f"{self.bench}-quick" if self.quick else self.bench)

    @property
    def home(self) -> str:
        """Folder below experiments/."""
        return {"synthetic": "synthetic", "faces": "faces", "celeba": "celeba_hq"}[self.data]

    @property
    def kept(self) -> Path:
        """Where plans, presences and tables are committed."""
        return ROOT / "experiments" / self.home

    def line(self, stage: str, **also: object) -> str:
        """The command that runs a stage of this bench under these settings."""
        usual = of_bench(self.bench, {}, self.quick)
        names = [field.name for field in fields(self) if field.name not in ("bench", "quick")]
        changed = {n.upper(): v for n in names if (v := getattr(self, n)) != getattr(usual, n)}
        several = {"BENCHES": self.bench} if self.data == "synthetic" else {}
        given = also | ({"QUICK": 1} if self.quick else {}) | several | changed
        return script_hint(f"{self.home}/run_all.sh", STAGE=stage, **given)

    def seed_list(self) -> list[int]:
        """Of trainings."""
        return parse_numbers("SEEDS", self.seeds, 1000, "seeds")

    def has_reference(self, seed: int) -> bool:
        """Whether recipe reference is asked of models of this seed."""
        return seed in parse_numbers("REFERENCE_SEEDS", self.reference_seeds, 1000, "seeds")


BENCHES: dict[str, dict[str, Any]] = {
    "synthetic": {},
    "synthetic_4x4": {
        "networks": "unet",
        "bench": "synthetic_4x4",
        "shapes": "triangle,circle,square,cross",
        "colors": "red,blue,green,orange",
        "held_out": "triangle red|circle blue|square green|cross orange",
        "count": 960,
        "samples": 4,
        "tune": 1,
    },
    "faces": {
        "bench": "faces",
        "data": "faces",
        "networks": "unet",
        "count": 2000,
        "samples": 4,
        "tune": 1,
        "held_out": "hat beard|glasses bald|long green_top",
        "steps": 700,
    },
    "celeba_hq": {
        "bench": "celeba_hq",
        "data": "celeba",
        "networks": "unet",
        "size": 64,
        "patch": 4,
        "unet_width": 64,
        "attributes": "Smiling,Eyeglasses,Male,Blond_Hair",
        "held_out": "Male Blond_Hair|Eyeglasses Blond_Hair",
        "count": 0,
        "steps": 20_000,
        "batch": 64,
        "lr": 1e-3,
        "samples": 8,
        "tune": 2,
    },
}
QUICK = {  # what QUICK=1 changes: seconds instead of an hour, and tables that mean nothing
    "seeds": "0",
    "count": 48,
    "samples": 1,
    "tune": 1,
    "steps": 6,
    "truth_steps": 3,
    "truth_batch": 8,
    "truth_width": 16,
    "truth_depth": 1,
    "batch": 8,
    "unet_width": 8,
    "dit_width": 16,
    "dit_depth": 1,
    "lds_subsets": 3,
    "most": 4,
}


def of_bench(name: str, given: Mapping[str, Any], quick: bool = False) -> AttributeSettings:
    """Settings of a bench with what the user set on top. UserError for one that there is not."""
    if name not in BENCHES:
        raise UserError(f"BENCHES names {name!r}; set BENCHES to some of {', '.join(BENCHES)}")
    base = replace(AttributeSettings(), **BENCHES[name])
    values = {**(QUICK if quick else {}), **given}
    return replace(base, quick=quick, **values)
