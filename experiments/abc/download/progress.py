"""What a download shows: one bar over all bytes, and lines that do not tear it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def bytes_bar(label: str, total: int, initial: int = 0) -> tqdm:
    """A bar to `total` bytes; none where stderr is no terminal."""
    from tqdm import tqdm

    unit = {"unit": "B", "unit_scale": True}
    return tqdm(desc=label, total=total, initial=initial, disable=None, **unit)


def say(line: str) -> None:
    """Print a line without tearing the bar."""
    from tqdm import tqdm

    tqdm.write(line)


def human(count: float) -> str:
    """12.3GB, in powers of 1000 as the hub's pages show."""
    from tqdm import tqdm

    return tqdm.format_sizeof(count, "B")
