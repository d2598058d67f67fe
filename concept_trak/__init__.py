"""Concept attribution for diffusion models: which training images taught a concept."""

import os
from typing import Any

# Read by the libraries when they are imported: their notes on optional packages would bury our one
# line for a user's mistake.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# The packages in the order of the data's way. A module imports from its own and earlier ones only
# (tests/test_layers.py).
LAYERS = (
    "models",
    "datasets",
    "gradients",
    "store",
    "scoring",
    "index",
    "attribution",
    "components",
    "report",
    "service",
)

__all__ = ["Answer", "Attributor", "ConceptEdit"]


def __getattr__(name: str) -> Any:
    """The Python API, loaded when it is asked for: it needs torch, and a help text does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
