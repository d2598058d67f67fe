"""Labelled pictures: every one has a class of each attribute, and some combinations are held out.

A folder in the layout of `datasets.image_folder`: each row of metadata.jsonl has a column for each
attribute, and "text", the caption that names the classes. attributes.json says which columns, their
classes, and which combinations the train split does not have.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from concept_trak.atomic_io import atomic_folder, write_bytes, write_json
from concept_trak.datasets.image_folder import ATTRIBUTES, ImageCaptionDataset, load_folder
from concept_trak.errors import UserError, remove_hint, script_hint
from concept_trak.models.vocabulary import Vocabulary
from concept_trak.validated_io import read_json

MEND = f"make the data again, e.g. {script_hint('synthetic/run_all.sh', STAGE='generate')}"
Labels = dict[str, str]  # attribute -> class


@dataclass(frozen=True)
class AttributeScheme:
    """vocabulary: attributes and classes. held_out: combinations that no train picture shows, each
    {attribute: class} of at least two attributes.
    """

    vocabulary: Vocabulary
    held_out: tuple[Labels, ...] = ()

    def is_held_out(self, labels: Mapping[str, str]) -> bool:
        """Whether a picture of these labels shows a held-out combination."""
        return any(all(labels[k] == v for k, v in pair.items()) for pair in self.held_out)

    def combinations(self) -> list[Labels]:
        """All of them, in order."""
        a = self.vocabulary.attributes
        return [dict(zip(a, c, strict=True)) for c in itertools.product(*a.values())]

    def as_json(self) -> dict[str, Any]:
        """For `read_scheme`."""
        words = [[name, list(classes)] for name, classes in self.vocabulary.attributes.items()]
        return {"attributes": words, "held_out": [dict(pair) for pair in self.held_out]}


def parse_held_out(vocabulary: Vocabulary, text: str) -> tuple[Labels, ...]:
    """ "triangle red|circle blue" -> the combinations. UserError for a word that is no class, or a
    combination of fewer than two attributes.
    """
    found = []
    for part in filter(None, (p.strip() for p in text.split("|"))):
        labels = vocabulary.parse(",".join(part.replace(",", " ").split()))
        if len(labels) < 2:
            raise UserError(
                f"HELD_OUT={text!r}: {part!r} is no combination; name classes of two attributes "
                "in HELD_OUT"
            )
        found.append(labels)
    return tuple(found)


def read_scheme(root: str | Path, mend: str = MEND) -> AttributeScheme:
    """The attributes of a folder. UserError, which ends with `mend`, when the file is missing or
    none.
    """
    path = Path(root) / ATTRIBUTES
    if not path.is_file():
        raise UserError(f"{path} is missing: it names the attributes and classes; {mend}")
    found = read_json(path, mend)
    try:
        words = {str(name): tuple(map(str, classes)) for name, classes in found["attributes"]}
        vocabulary = Vocabulary(words)
        pairs = tuple(dict(pair) for pair in found["held_out"])
        if not all(vocabulary.attribute_of(w) == (a, w) for p in pairs for a, w in p.items()):
            raise ValueError("held_out")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no list of attributes ({error!r:.80}); {mend}") from None
    return AttributeScheme(vocabulary, pairs)


def load_labelled(
    root: str | Path, mend: str = MEND
) -> tuple[ImageCaptionDataset, AttributeScheme]:
    """Pictures and their scheme. UserError, which ends with `mend`, for a row whose label is no
    class, or a class that no train picture shows: nothing can be asked about it.
    """
    scheme, data = read_scheme(root, mend), load_folder(root)
    for name, classes in scheme.vocabulary.attributes.items():
        values = data.column(name)
        for row, value in enumerate(values, 1):
            if value not in classes:
                told = f"row {row} has {name}={value!r:.40}, which is none of {', '.join(classes)}"
                raise UserError(f"{data.root}: {told}; {mend}")
        shown = set(data.split("train").column(name))
        if missing := [c for c in classes if c not in shown]:
            raise UserError(f"{data.root} has no train picture of {name} {missing[0]}; {mend}")
    return data, scheme


def labels_of(scheme: AttributeScheme, data: ImageCaptionDataset) -> list[Labels]:
    """Of every picture."""
    names = scheme.vocabulary.names
    return [{name: record[name] for name in names} for record in data.records]


def balanced(combinations: Sequence[Labels], count: int) -> list[Labels]:
    """`count` labels, each combination as often as can be."""
    return [combinations[i % len(combinations)] for i in range(count)]


def write_combinations(
    root: Path,
    scheme: AttributeScheme,
    counts: tuple[int, int, int],
    pictures: Callable[..., Iterator[tuple[Labels, Image.Image]]],
    made_from: dict[str, Any],
) -> None:
    """Train pictures, held-out ones of every combination, and some for the classifier: so many each
    of `counts`, drawn by pictures(labels, stream=number of the split).

    UserError when the held-out combinations leave a class without a picture.
    """
    everything = scheme.combinations()
    seen = [labels for labels in everything if not scheme.is_held_out(labels)]
    for name, classes in scheme.vocabulary.attributes.items():
        if lost := [c for c in classes if c not in {labels[name] for labels in seen}]:
            raise UserError(f"no picture of {lost[0]} is left; name fewer combinations in HELD_OUT")
    plans = {"train": seen, "held_out": everything, "classifier": everything}
    splits = {
        split: (pictures(balanced(among, count), stream=stream), count)
        for stream, ((split, among), count) in enumerate(zip(plans.items(), counts, strict=True))
    }
    write_labelled(root, scheme, splits, made_from)


def write_labelled(
    root: Path,
    scheme: AttributeScheme,
    splits: Mapping[str, tuple[Iterable[tuple[Labels, Image.Image]], int]],
    made_from: dict[str, Any],
) -> None:
    """A folder of {split: ((labels, picture) pairs, their number)}; there when it is whole."""
    with atomic_folder(root) as folder:
        lines = []
        for split, (pairs, count) in splits.items():
            for i, (labels, picture) in enumerate(tqdm(pairs, f"pictures {split}", count)):
                name = f"{split}/{i:05d}.png"
                (folder / split).mkdir(exist_ok=True)
                picture.save(folder / name)
                text = scheme.vocabulary.caption(labels)
                row = {"file_name": name, "text": text, "split": split, **labels}
                lines.append(json.dumps(row) + "\n")
        write_bytes(folder / "metadata.jsonl", "".join(lines).encode())
        write_json(folder / ATTRIBUTES, scheme.as_json() | {"made_from": made_from})


def is_made_from(root: Path, made_from: dict[str, Any]) -> bool:
    """Whether a folder is there and was made from exactly this."""
    path = root / ATTRIBUTES
    return path.is_file() and read_json(path, remove_hint(root)).get("made_from") == made_from
