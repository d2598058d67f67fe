"""What is trained again: subsets of the train pictures, some under other captions.

A plan is JSON, committed, and made again to the same bytes from its seed:

    {"data": content hash of the pictures, "subsets": [{"name", "seed", "removed", "captions"}]}

    lies            a tenth of the pictures under a caption whose object and style are both wrong
    hidden          half of the captions leave the style, or the object, out
    counterfactual  without the pictures that a ranker, or a control, names
    lds             random subsets, each concept kept at a rate of its own

All concepts fall into two groups, fixed by `GROUP_SEED` before anything was measured: on "tune"
ones everything is chosen, "report" ones are what the tables show.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from concept_trak.atomic_io import write_bytes
from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.datasets.labels import STYLE_PREFIX, caption
from concept_trak.errors import UserError, script_hint
from concept_trak.settings import resolve
from concept_trak.validated_io import read_json

GROUPS = ("tune", "report")
GROUP_SEED = 2024
KINDS = ("object", "style")
WITHOUT = {"object": "style", "style": "object"}  # what a caption leaves without a concept
NOT_LABELS = {"file_name", "text", "caption", "split"}  # columns of other data that name no concept
KEEP_RATES = (0.0, 0.25, 0.5, 1.0)  # of a concept in a subset of the LDS
LIES = 96

CaptionVariants = list[str]  # of a picture: full caption, object alone, style alone


@dataclass(frozen=True)
class Subset:
    """What one model learns. removed: rows of the train pictures that it never sees. captions:
    {row: its three `CaptionVariants`} where they are not the data's own; an empty text teaches
    nothing.
    """

    name: str
    seed: int
    removed: tuple[int, ...] = ()
    captions: dict[int, CaptionVariants] = field(default_factory=dict)

    def kept(self, count: int) -> np.ndarray:
        """bool [count]: the pictures that it learns."""
        kept = np.ones(count, dtype=bool)
        kept[list(self.removed)] = False
        return kept


@dataclass(frozen=True)
class RetrainingPlan:
    """Subsets of the pictures whose content hash is `data`; made_from: JSON that decides them."""

    name: str
    data: str
    subsets: tuple[Subset, ...]
    made_from: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, a line for each subset. UserError for a disk that does not take it."""
        about = {k: v for k, v in asdict(self).items() if k != "subsets"}
        head = json.dumps(about, sort_keys=True).removesuffix("}")
        lines = [json.dumps(asdict(s), sort_keys=True) for s in self.subsets]
        body = ",\n".join(lines)
        write_bytes(path, f'{head}, "subsets": [\n{body}\n]}}\n'.encode())


def read_plan(path: Path, data: ImageCaptionDataset) -> RetrainingPlan:
    """What `RetrainingPlan.write` wrote. UserError for a file that is none, or of other
    pictures."""
    found = read_json(path, restore_hint(path))
    try:
        subsets = tuple(map(_subset, found["subsets"]))
        if len({s.name for s in subsets}) < len(subsets):
            raise ValueError("a name is there twice")
        plan = RetrainingPlan(
            _name(found["name"]), str(found["data"]), subsets, dict(found["made_from"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no plan ({error!r:.80}); {restore_hint(path)}") from None
    if plan.data != data.content_hash():
        raise UserError(
            f"{path} is a plan for other pictures than {data.root}; {restore_hint(path)}"
        )
    rows = {row for s in subsets for row in (*s.removed, *s.captions)}
    if rows and not 0 <= min(rows) <= max(rows) < len(data):
        raise UserError(
            f"{path} names pictures that {data.root} does not have; {restore_hint(path)}"
        )
    return plan


def kept_plan(folder: Path, name: str, data: ImageCaptionDataset) -> RetrainingPlan:
    """The plan of that name in a folder of plans. UserError as `read_plan`, and for another's."""
    path = folder / f"{name}.json"
    plan = read_plan(path, data)
    if plan.name != name:
        raise UserError(f"{path} is the plan {plan.name!r}; {restore_hint(path)}")
    return plan


def _subset(told: Any) -> Subset:
    """Of its JSON; KeyError, TypeError or ValueError for what is none."""
    captions = told["captions"].items()
    return Subset(
        _name(told["name"]),
        _number(told["seed"]),
        tuple(map(_number, told["removed"])),
        {int(row): _texts(texts) for row, texts in captions},
    )


def _name(value: Any) -> str:
    """One that a file may have."""
    fits = isinstance(value, str) and value.isprintable() and re.fullmatch(r"[^./][^/]*", value)
    if not fits:
        raise ValueError(f"{value!r:.40} is no name")
    return str(value)


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no number")
    return value


def _texts(value: Any) -> CaptionVariants:
    if not isinstance(value, list) or [type(text) for text in value] != [str] * 3:
        raise ValueError(f"{value!r:.40} is not three captions")
    return value


def retrain_line(plan: str, work: Path) -> str:
    """The command that makes a plan of the emoji data and trains its models in TRUTH_DIR."""
    test = "lds" if plan == "base" else plan  # every test needs the plan of all pictures
    elsewhere = {} if str(work) == resolve("emoji", {}).truth_dir else {"TRUTH_DIR": work}
    return script_hint(f"truth/run_{test}.sh", RETRAIN=1, **elsewhere)


def restore_hint(path: Path) -> str:
    """What restores a committed plan, or presences; those of one's own are made anew."""
    where = shlex.quote(os.path.relpath(path))
    again = f"have RETRAIN=1 make one of your own again: rm {where}"
    return f"bring back a committed one, git checkout -- {where}, or {again}"


# ---- concepts and groups


def texts(object_phrase: str, style_phrase: str) -> CaptionVariants:
    """What a picture may be taught under: full caption, object alone, style alone."""
    style = f"{STYLE_PREFIX.strip()} {style_phrase}"
    return [caption(object_phrase, style_phrase), object_phrase, style]


def texts_of(data: ImageCaptionDataset, subset: Subset) -> list[CaptionVariants]:
    """The `CaptionVariants` of every picture, the subset's where it has its own."""
    own = [texts(r["object_phrase"], r["style_phrase"]) for r in data.records]
    return [subset.captions.get(row, told) for row, told in enumerate(own)]


def with_captions(data: ImageCaptionDataset, subset: Subset) -> ImageCaptionDataset:
    """The pictures under the captions that the subset teaches."""
    captions = [told[0] for told in texts_of(data, subset)]
    return ImageCaptionDataset(data.root, data.records, captions)


def kinds_of(data: ImageCaptionDataset) -> tuple[str, ...]:
    """The kinds of concept that pictures are labelled with: object and style, or whatever columns
    other data have (`experiments.attributes.schemes`).
    """
    columns = data.records[0].keys()
    return KINDS if set(KINDS) <= columns else tuple(k for k in columns if k not in NOT_LABELS)


def other_kind(data: ImageCaptionDataset, kind: str) -> str:
    """Another kind, which pictures of a concept show, too."""
    kinds = kinds_of(data)
    return kinds[(kinds.index(kind) + 1) % len(kinds)]


def split_concepts(data: ImageCaptionDataset) -> dict[str, dict[str, list[str]]]:
    """{group: {kind: concepts}}: each kind's concepts halved at random, the same every time."""
    found: dict[str, dict[str, list[str]]] = {group: {} for group in GROUPS}
    for number, kind in enumerate(kinds_of(data)):
        names = sorted(set(data.column(kind)))
        order = np.random.default_rng([GROUP_SEED, number]).permutation(len(names))
        for group, part in zip(GROUPS, np.array_split(order, len(GROUPS)), strict=True):
            found[group][kind] = sorted(names[i] for i in part)
    return found


# ---- plans


def base_plan(data: ImageCaptionDataset, seeds: Sequence[int]) -> RetrainingPlan:
    """All pictures as they are."""
    return RetrainingPlan("base", data.content_hash(), tuple(Subset(f"base-{s}", s) for s in seeds))


def lies_plan(data: ImageCaptionDataset, seeds: Sequence[int]) -> RetrainingPlan:
    """For each seed a model that learns `LIES` pictures under wrong captions, and one without them.

    The lies of a seed are drawn by it. Objects lose pictures or are claimed by lies, never both, so
    that the effects of the two can be told apart: half of them at random is claimed.
    """
    subsets: list[Subset] = []
    for seed in seeds:
        captions = draw_wrong_captions(data, np.random.default_rng([GROUP_SEED, 7, seed]))
        subsets.append(Subset(f"lies-{seed}", seed, (), captions))
        subsets.append(Subset(f"without-{seed}", seed, tuple(sorted(captions))))
    return RetrainingPlan("lies", data.content_hash(), tuple(subsets), {"lies": LIES})


def draw_wrong_captions(
    data: ImageCaptionDataset, rng: np.random.Generator
) -> dict[int, CaptionVariants]:
    """{row: texts of another object and another style}; see `lies_plan`.

    Claimed objects are half of each group, and claimed as often as one another; so are styles.
    """
    objects, styles = np.array(data.column("object")), np.array(data.column("style"))
    halves = [rng.permutation(split_concepts(data)[group]["object"]) for group in GROUPS]
    claimed = np.concatenate([half[: len(half) // 2] for half in halves])
    liars = rng.permutation(np.flatnonzero(~np.isin(objects, claimed)))[:LIES]
    wanted_objects = rng.permutation(np.resize(claimed, len(liars)))
    wanted_styles = rng.permutation(np.resize(np.unique(styles), len(liars)))
    while (same := np.flatnonzero(wanted_styles == styles[liars])).size:
        # a lie that would tell the true style gives it to another at random, until none does
        other = rng.integers(len(liars), size=same.size)
        for i, j in zip(same, other, strict=True):
            wanted_styles[[i, j]] = wanted_styles[[j, i]]
    object_phrase = {r["object"]: r["object_phrase"] for r in data.records}
    style_phrase = {r["style"]: r["style_phrase"] for r in data.records}
    claims = zip(liars, wanted_objects, wanted_styles, strict=True)
    return {int(i): texts(object_phrase[o], style_phrase[s]) for i, o, s in claims}


def hidden_plan(data: ImageCaptionDataset, seeds: Sequence[int]) -> RetrainingPlan:
    """For each kind of concept and seed a model that learns a random half of the pictures under
    captions that leave the kind out, and one without those of them that show a "report" concept.
    """
    subsets: list[Subset] = []
    for kind, seed in ((kind, seed) for kind in KINDS for seed in seeds):
        rng = np.random.default_rng([GROUP_SEED, 11, KINDS.index(kind), seed])
        rows = sorted(rng.permutation(len(data))[: len(data) // 2].tolist())
        captions = {row: _without(texts_of(data, Subset("", 0))[row], kind) for row in rows}
        reported = set(split_concepts(data)["report"][kind])
        gone = tuple(row for row in rows if data.records[row][kind] in reported)
        subsets.append(Subset(f"hidden-{kind}-{seed}", seed, (), captions))
        subsets.append(Subset(f"gone-{kind}-{seed}", seed, gone, captions))
    return RetrainingPlan("hidden", data.content_hash(), tuple(subsets))


def _without(told: CaptionVariants, kind: str) -> CaptionVariants:
    _, object_alone, style_alone = told
    left = style_alone if kind == "object" else object_alone
    return [left, "", left] if kind == "object" else [left, left, ""]


def lds_plan(data: ImageCaptionDataset, count: int, again: int) -> RetrainingPlan:
    """`count` random subsets with seed 0, and the first `again` of them with seed 1.

    In each, half of the concepts at random have a keep rate of their own, of `KEEP_RATES`, the
    others 1/2; a picture is kept with probability min(1, 2 r_object r_style), of K kinds with
    min(1, 2^(K - 1) times the product of theirs).
    """
    draws = [(i, seed) for seed, n in ((0, count), (1, again)) for i in range(n)]
    subsets = [Subset(f"lds-{i}-{seed}", seed, random_removal(data, i)) for i, seed in draws]
    made_from = {"count": count, "again": again, "keep_rates": list(KEEP_RATES)}
    return RetrainingPlan("lds", data.content_hash(), tuple(subsets), made_from)


def random_removal(data: ImageCaptionDataset, number: int) -> tuple[int, ...]:
    """What subset `number` of the LDS leaves out; see `lds_plan`."""
    rng = np.random.default_rng([GROUP_SEED, 13, number])
    kinds = kinds_of(data)
    keep = np.full(len(data), 2.0 ** (len(kinds) - 1))
    for kind in kinds:
        names, which = np.unique(data.column(kind), return_inverse=True)
        own = rng.choice(KEEP_RATES, len(names))
        keep *= np.where(rng.random(len(names)) < 0.5, own, 0.5)[which]
    return tuple(np.flatnonzero(rng.random(len(data)) >= keep).tolist())


def counterfactual_plan(
    data: ImageCaptionDataset, arms: dict[str, Iterable[int]], seeds: Sequence[int]
) -> RetrainingPlan:
    """For each seed one model without the pictures of each arm, {name: rows}."""
    chosen = {arm: tuple(sorted(map(int, rows))) for arm, rows in arms.items()}
    subsets = [
        Subset(f"{arm}-{seed}", seed, rows) for seed in seeds for arm, rows in chosen.items()
    ]
    return RetrainingPlan("counterfactual", data.content_hash(), tuple(subsets))


def with_arms(
    plan: RetrainingPlan, names: Iterable[str], make: Callable[[], RetrainingPlan]
) -> RetrainingPlan:
    """A counterfactual plan with the arms of `names` that it lacks, as `make()` has them. What is
    in it stays as it is: models were trained by it.
    """
    known = {_arm(s) for s in plan.subsets}
    wanted = [name for name in names if name not in known]
    if not wanted:
        return plan
    more = tuple(s for s in make().subsets if _arm(s) in wanted)
    return replace(plan, subsets=plan.subsets + more)


def _arm(subset: Subset) -> str:
    """ "object-d_trak-0" -> "d_trak"."""
    return subset.name.split("-", 1)[1].rsplit("-", 1)[0]
