"""CelebAMask-HQ (Lee et al. 2020) as labelled pictures.

    CelebA-HQ-img/0.jpg, 1.jpg, ...        30,000 photos of 1024 x 1024 pixels
    CelebAMask-HQ-attribute-anno.txt       number of rows; names of 40 attributes; then a row a
                                           photo: its file name, and 1 or -1 for each attribute

An attribute "Smiling" has the classes Smiling and no_Smiling. Photos of a held-out combination are
never trained on; they, and as many others, are the held-out split. The pictures are for research
and education only, and are not in this repository.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.errors import UserError, script_hint
from concept_trak.models.vocabulary import Vocabulary
from concept_trak.validated_io import read_text, safe_join

from .schemes import AttributeScheme, Labels, parse_held_out, write_labelled

IMAGES, LIST = "CelebA-HQ-img", "CelebAMask-HQ-attribute-anno.txt"
SITE = "https://github.com/switchablenorms/CelebAMask-HQ"
HELD_OUT, CLASSIFIER = 0.02, 0.1  # shares of the photos that show no held-out combination


@dataclass(frozen=True)
class CelebaSettings:
    """source: the unpacked download. count: train photos at most, 0: all."""

    source: str
    attributes: tuple[str, ...]
    held_out: str
    size: int = 64
    count: int = 0
    seed: int = 0

    def scheme(self) -> AttributeScheme:
        """Attributes and held-out combinations."""
        vocabulary = Vocabulary({name: (name, f"no_{name}") for name in self.attributes})
        return AttributeScheme(vocabulary, parse_held_out(vocabulary, self.held_out))


def read_list(source: Path, attributes: tuple[str, ...]) -> tuple[list[str], list[Labels]]:
    """(file names, labels) of the attributes asked for.

    UserError for a missing or malformed list, or an attribute that it does not have.
    """
    path, mend = source / LIST, f"download it again from {SITE} and set SOURCE to its folder"
    if not path.is_file():
        line = script_hint("celeba_hq/run_all.sh", SOURCE="CelebAMask-HQ")
        raise UserError(f"the attribute file {path} is missing; give the folder of {SITE}: {line}")
    lines = [line.split() for line in read_text(path, mend).splitlines() if line.strip()]
    if len(lines) < 3 or len(lines[0]) != 1 or not lines[0][0].isdigit():
        raise UserError(f"{path} does not begin with a count and the names; {mend}")
    (count, *_), known, *rows = lines
    if int(count) != len(rows):
        raise UserError(f"{path} has {len(rows)} rows but promises {count}; {mend}")
    for name in attributes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or known
            raise UserError(
                f"{path} has no attribute {name!r}; name in ATTRIBUTES e.g. {', '.join(close)}"
            )
    places = {name: known.index(name) + 1 for name in attributes}
    labels = []
    for number, row in enumerate(rows, 3):
        if len(row) != len(known) + 1 or not {*row[1:]} <= {"1", "-1"}:
            raise UserError(
                f"{path}, line {number} is not a name and {len(known)} of 1, -1; {mend}"
            )
        safe_join(source / IMAGES, row[0], f"{path}, line {number}: the photo", links=True)
        labels.append({a: a if row[i] == "1" else f"no_{a}" for a, i in places.items()})
    return [row[0] for row in rows], labels


def split(
    scheme: AttributeScheme, labels: list[Labels], settings: CelebaSettings
) -> dict[str, list[int]]:
    """{split: photos}. UserError for a held-out combination that no photo shows, and a class that
    would be left without one.
    """
    for pair in scheme.held_out:
        if not any(all(told[k] == v for k, v in pair.items()) for told in labels):
            raise UserError(f"no picture shows {' and '.join(pair.values())}; mend HELD_OUT")
    order = list(range(len(labels)))
    random.Random(settings.seed).shuffle(order)
    out = [i for i in order if scheme.is_held_out(labels[i])]
    seen = [i for i in order if not scheme.is_held_out(labels[i])]
    few, some = max(1, int(HELD_OUT * len(seen))), max(1, int(CLASSIFIER * len(seen)))
    half = len(out) // 2
    train = seen[few + some :][: settings.count or None]
    for name, classes in scheme.vocabulary.attributes.items():
        if lost := [c for c in classes if c not in {labels[i][name] for i in train}]:
            raise UserError(f"no train picture shows {lost[0]}; mend ATTRIBUTES or HELD_OUT")
    return {
        "train": sorted(train),
        "held_out": sorted(seen[:few] + out[:half]),
        "classifier": sorted(seen[few : few + some] + out[half:]),
    }


def make(root: Path, settings: CelebaSettings) -> None:
    """A folder of `experiments.attributes.schemes`, photos reduced to the size asked for."""
    scheme, source = settings.scheme(), Path(settings.source)
    if not settings.source:
        raise UserError(f"SOURCE is empty; set SOURCE to the folder of {SITE}")
    names, labels = read_list(source, settings.attributes)
    records = [{"file_name": name} for name in names]
    photos = ImageCaptionDataset(source / IMAGES, records, names)
    chosen = split(scheme, labels, settings)

    def pictures(rows: list[int]) -> Iterator[tuple[Labels, Image.Image]]:
        for i in rows:
            yield labels[i], Image.fromarray(np.asarray(photos.image(i, settings.size)))

    splits = {name: (pictures(rows), len(rows)) for name, rows in chosen.items()}
    write_labelled(root, scheme, splits, json.loads(json.dumps(asdict(settings))))
