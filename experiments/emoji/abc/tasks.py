"""Tokens, their exemplars and the queries asked of them.

An object token <new1> has one object in six styles, a style token six objects in one style; its
train prompt is "a <new1>" or "in the style of <new1>". A query is a picture drawn from "a <new1> in
the style of S" or "O in the style of <new1>", S and O known to the model, drawn by a fixed seed.
The tokens of split "tune" choose dampings and are reported nowhere; of split "distractor" no token
is learned, their pictures are only there to be mistaken for exemplars.
"""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from concept_trak.datasets.image_folder import ImageCaptionDataset
from concept_trak.datasets.labels import STYLE_PREFIX, caption
from concept_trak.errors import UserError, git_restore_hint
from concept_trak.settings import TOKEN
from concept_trak.validated_io import file_errors, read_text

BUILD = "python -m experiments.emoji.artwork.exemplars --out data/emoji --work build/emoji"
REMEDY = f"build it: {BUILD}"
QUERIES, SEED = 6, 0  # queries a token, and what draws their known halves


@dataclass(frozen=True, eq=False)
class Token:
    """A learned word. pictures: uint8 [E, H, W, 3], its exemplars."""

    name: str
    kind: str
    split: str
    pictures: np.ndarray

    @property
    def train_prompt(self) -> str:
        """What the exemplars are captioned with where they are captioned."""
        return f"a {TOKEN}" if self.kind == "object" else f"{STYLE_PREFIX.strip()} {TOKEN}"

    @property
    def init_word(self) -> str:
        """A known word of the kind, from which the training of the token starts."""
        return "cat" if self.kind == "object" else "blob"


@dataclass(frozen=True)
class Task:
    """One query. number: also the seed of its x_T. without: the prompt without the token."""

    token: Token
    number: int
    prompt: str
    without: str


def read_tokens(root: Path) -> list[Token]:
    """Of a data folder, in the order of its table. UserError for a file that is missing or does not
    fit.
    """
    table, path = root / "tables/exemplars.tsv", root / "exemplars.npz"
    text = io.StringIO(read_text(table, git_restore_hint(table)), newline="")
    rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not path.is_file():
        raise UserError(f"the exemplars {path} are missing; {REMEDY}")
    try:
        with file_errors(path, REMEDY), np.load(path) as content:
            pictures = content["pictures"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); {REMEDY}") from None
    if len(pictures) != len(rows):
        raise UserError(f"{path} has {len(pictures)} pictures for {len(rows)} rows; {REMEDY}")
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(row["token"], []).append(i)
    return [
        Token(name, rows[of[0]]["kind"], rows[of[0]]["split"], pictures[of])
        for name, of in found.items()
    ]


def tasks_of(tokens: list[Token], train: ImageCaptionDataset) -> list[Task]:
    """QUERIES of each token, the same whatever is asked of them."""
    rng, found = np.random.default_rng(SEED), []
    known = {kind: sorted(set(train.column(f"{kind}_phrase"))) for kind in ("object", "style")}
    for token in tokens:
        if token.split == "distractor":
            continue
        other = "style" if token.kind == "object" else "object"
        count = min(QUERIES, len(known[other]))
        for word in rng.choice(known[other], count, replace=False):
            if token.kind == "object":
                prompt, without = caption(f"a {TOKEN}", word), f"{STYLE_PREFIX.strip()} {word}"
            else:
                prompt, without = caption(word, TOKEN), str(word)
            found.append(Task(token, len(found), prompt, without))
    return found
