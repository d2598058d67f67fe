"""What is asked of both pipelines: prompts with their seeds, from a file or our own few.

.csv    with a header; columns by the names of `COLUMNS`, others are passed over. So the files
        of I2P, of ESD and of the published protocols are read as they are
.json   captions of COCO: {"annotations": [{"image_id", "id", "caption"}]}; the first caption of
        each picture
.txt    a prompt a line; of objects and styles, a class or an artist a line, put into our own
        sentences
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from concept_trak.errors import UserError
from concept_trak.settings import Settings
from concept_trak.validated_io import parse_json, read_text

COLUMNS = {
    "prompt": ("prompt", "caption", "text"),
    "of": ("class", "artist", "label"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance"),
}
MEND = "give PROMPTS_FILE a .csv with a column prompt, COCO captions (.json), or a .txt"


@dataclass(frozen=True)
class PromptRow:
    """A prompt as it was given. of: the class or artist that it asks for, or empty."""

    prompt: str
    of: str = ""
    seed: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class SampleRequest:
    """One picture: a prompt, the seed of its noise, the guidance; of: see `PromptRow`."""

    prompt: str
    seed: int
    guidance: float
    of: str = ""


def asks(settings: Settings, lines: Sequence[PromptRow]) -> list[SampleRequest]:
    """A picture a line that has a seed, SEEDS_PER_PROMPT of one that has none; of NUM_QUERIES lines
    at most of each class, artist or, where there is neither, in all. Exact repeats are left out.
    """
    s, seen, found = settings, Counter(), []
    for line in lines:
        seen[line.of] += 1
        if s.num_queries and seen[line.of] > s.num_queries:
            continue
        own = range(s.seed, s.seed + s.seeds_per_prompt)
        guidance = s.gen_guidance_scale if line.guidance is None else line.guidance
        seeds = own if line.seed is None else [line.seed]
        found += [SampleRequest(line.prompt, seed, guidance, line.of) for seed in seeds]
    return list(dict.fromkeys(found))


def read_lines(path: Path, sentences: Sequence[str] = ()) -> list[PromptRow]:
    """The prompts of a file, see above. sentences: with "{}", into which a .txt's lines are put;
    empty where they are prompts themselves. UserError for a file that is none of them.
    """
    text = read_text(path, MEND)
    kinds = {".csv": _of_csv, ".json": _of_coco}
    if path.suffix.lower() in kinds:
        lines = kinds[path.suffix.lower()](path, text)
    elif path.suffix.lower() == ".txt":
        words = [word for line in text.splitlines() if (word := line.strip())]
        lines = fill(sentences, words) if sentences else [PromptRow(word) for word in words]
    else:
        raise UserError(f"{path} is of a kind that is not known; {MEND}")
    if not lines:
        raise UserError(f"{path} holds no prompt; {MEND}")
    if sentences and not all(line.of for line in lines):
        raise UserError(
            f"{path} has no column {' or '.join(COLUMNS['of'])} that is filled in each row; give "
            "PROMPTS_FILE a .csv that has, or a .txt of the names alone"
        )
    return lines


def fill(sentences: Sequence[str], words: Sequence[str]) -> list[PromptRow]:
    """Every sentence about every word."""
    return [PromptRow(s.format(word), word) for word in words for s in sentences]


def _of_csv(path: Path, text: str) -> list[PromptRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; {MEND}") from None
    header = reader.fieldnames or []
    names = {k: next((n for n in known if n in header), None) for k, known in COLUMNS.items()}
    if names["prompt"] is None:
        raise UserError(f"{path} has no column prompt, only {', '.join(header)[:120]}; {MEND}")
    lines = []
    for number, row in enumerate(rows, 2):
        given = {k: (row.get(name) or "").strip() for k, name in names.items() if name}
        where = f"{path}, row {number}"
        if not given["prompt"]:
            raise UserError(f"{where}: the prompt is empty; remove the row from {path.name}")
        try:
            seed = int(given["seed"]) if given.get("seed") else None
            guidance = float(given["guidance"]) if given.get("guidance") else None
        except ValueError as error:
            raise UserError(
                f"{where}: {error}; mend the number in {path.name}, or leave it empty"
            ) from None
        if not 0 <= (seed or 0) < 2**63 or not abs(guidance or 0) < 1000:  # refuses NaN, too
            raise UserError(
                f"{where}: a seed or guidance is out of range (0 to 2^63 - 1, below 1000 in size); "
                f"mend it in {path.name}"
            )
        lines.append(PromptRow(given["prompt"], given.get("of", ""), seed, guidance))
    return lines


def _of_coco(path: Path, text: str) -> list[PromptRow]:
    found = parse_json(text, path, MEND, dict).get("annotations")
    first: dict[int, tuple[int, str]] = {}
    try:
        for note in found or ():
            own = (int(note["id"]), str(note["caption"]).strip())
            first[note["image_id"]] = min(own, first.get(note["image_id"], own))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} holds no captions as COCO's files do; {MEND}") from None
    return [PromptRow(first[image][1]) for image in sorted(first) if first[image][1]]
