"""FAISS, an optional library (extra `index`): imported when it is needed. No torch."""

from __future__ import annotations

from typing import Any

from ..errors import UserError

FOLDER = "index"  # of an index, inside that of its store


def faiss() -> Any:
    """The library. UserError where it is not installed."""
    try:
        import faiss as library
    except ImportError:
        raise UserError(
            "an index needs the library FAISS; install it: pip install 'concept-trak[index]'"
        ) from None
    return library
