"""Texts that name several things: numbers, sizes, devices. Each is refused in one line before any work begins."""

from __future__ import annotations

import re

from .errors import UserError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_numbers(variable: str, text: str, count: int, what: str) -> list[int]:
    """ "3,7-9" -> [3, 7, 8, 9]; empty is all `count`. UserError for anything else or out of range."""
    chosen = []
    for low, high in number_ranges(variable, text):
        # one too many is enough to be refused below
        chosen += range(low, min(high, max(low, count)) + 1)
    if bad := [s for s in chosen if s >= count]:
        raise UserError(
            f"{variable}={text!r} names {bad[0]} but there are only {count} {what} "
            f"(0 to {count - 1}); mend {variable}"
        )
    return chosen or list(range(count))


def parse_shards(text: str, count: int) -> list[int]:
    """SHARDS as numbers; see `parse_numbers`."""
    return parse_numbers("SHARDS", text, count, "shards of NUM_SPLIT")


def number_ranges(variable: str, text: str) -> list[tuple[int, int]]:
    """ "3,7-9" -> [(3, 3), (7, 9)]. UserError for anything else."""
    ranges = []
    for part in text.split(",") if text.strip() else ():
        numbers = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        low, high = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
        if high < low:
            raise UserError(f"{variable}={text!r} is not a list of numbers such as 3,7-9")
        ranges.append((low, high))
    return ranges


def parse_memory(text: str) -> int:
    """ "6GB", "500 MB" or a number of bytes -> bytes. UserError for anything else."""
    number = text.strip().rstrip("BKMGIbkmgi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"MAX_MEMORY={text!r} is not a size; write it as 6GB or 500MB")
    return size


def parse_gpu_ids(text: str) -> list[str]:
    """ "0 1 2" or "0,1,2" -> ["0", "1", "2"]; "cpu" stands for a process on the CPU and may be
    repeated. UserError for anything else.
    """
    ids = text.replace(",", " ").split()
    if bad := [i for i in ids if i != "cpu" and not i.isdecimal()]:
        raise UserError(
            f"GPU_IDS={text!r} names {bad[0]!r}; give numbers of GPUs such as '0 1 2 3', or cpu"
        )
    if bad := [i for i in ids if i != "cpu" and ids.count(i) > 1]:
        raise UserError(
            f"GPU_IDS={text!r} names GPU {bad[0]} twice; its processes would share the memory"
        )
    return ids
