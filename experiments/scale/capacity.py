"""What an index of many pictures takes, on paper, from constants that were measured on one core.

    bytes of rows   2 N k                         float16, on the disks
    bytes of codes  N (kept_dim(k) / 8 + 8)       in memory, or mapped from the disks
    nodes           whatever holds both
    seconds         codes of a node / (cores x codes a core reads in a second)
                    + candidates, read one by one, + what a query and a node exchange

Times are those of cores that do not wait for one another: with memory that is shared by the cores
of a node, as on all machines, `code_rate` should be measured with all of them busy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from concept_trak.index.whitening import kept_dim

ROW_BYTES, CODE_EXTRA = 2, 8  # of a value in float16; of a code's two numbers
NETWORK_SECONDS = 0.01  # to ask a node and to hear from it; all are asked at once


@dataclass(frozen=True)
class Node:
    """A machine. memory, disk: bytes there are for codes and for rows."""

    memory: float = 200e9
    disk: float = 8e12
    cores: int = 32


@dataclass(frozen=True)
class Constants:
    """Measured on one core.

    code_rate: bytes of codes searched a second. scan_rate: bytes of float16 rows scored a second.
    build_rate: values of rows coded a second. row_seconds: to read and score one candidate of
    `row_values` values.
    """

    code_rate: float
    scan_rate: float
    build_rate: float
    row_seconds: float
    row_values: int


@dataclass(frozen=True)
class Need:
    """Bytes of rows and codes, nodes, seconds of one query (one damping, one end) by index and by
    scan on these nodes, and hours to build the index on them.
    """

    rows: float
    codes: float
    nodes: int
    search_seconds: float
    scan_seconds: float
    build_hours: float


def need(
    pictures: float, dim: int, measured: Constants, node: Node | None = None, candidates: int = 2000
) -> Need:
    """Of so many pictures with rows of `dim` values. ValueError for numbers below one."""
    if pictures < 1 or dim < 1:
        raise ValueError(f"{pictures} pictures of {dim} values are none")
    node = node or Node()
    rows = ROW_BYTES * pictures * dim
    codes = pictures * code_bytes(dim)
    nodes = max(1, math.ceil(codes / node.memory), math.ceil(rows / node.disk))
    cores = nodes * node.cores
    each = measured.row_seconds * dim / measured.row_values
    search = codes / (cores * measured.code_rate) + candidates * each / cores + NETWORK_SECONDS
    scan = rows / (cores * measured.scan_rate) + NETWORK_SECONDS
    build = pictures * dim / (cores * measured.build_rate) / 3600
    return Need(rows, codes, nodes, search, scan, build)


def code_bytes(dim: int) -> int:
    """Bytes of the code of a row of `dim` values."""
    return math.ceil(kept_dim(dim) / 8) + CODE_EXTRA


def table(measured: Constants, node: Node | None = None) -> str:
    """Markdown: 10^8 and 2 x 10^9 pictures at k = 4,096 and 32,768."""
    node = node or Node()
    lines = [
        "| pictures | k | rows | codes | nodes | a query by index | by scan | build |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pictures in (1e8, 2e9):
        for dim in (4096, 32_768):
            n = need(pictures, dim, measured, node)
            lines.append(
                f"| {pictures:.0e} | {dim:,} | {n.rows / 1e12:.1f} TB | {n.codes / 1e9:,.0f} GB | "
                f"{n.nodes} | {n.search_seconds:.2f} s | {n.scan_seconds:.1f} s | "
                f"{n.build_hours:.1f} h |"
            )
    told = f"A node: {node.memory / 1e9:.0f} GB for codes, {node.disk / 1e12:.0f} TB for rows, "
    return "\n".join([f"{told}{node.cores} cores.", "", *lines])
