"""Concept attribution for diffusion models: which training images taught a concept."""

import os

# Read by the libraries when they are imported: their notes on optional packages would bury our one
# line for a user's mistake.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# The rooms in the order of the data's way. A module imports from its own and earlier rooms only
# (tests/test_rooms.py).
ROOMS = (
    "models",
    "datasets",
    "rows",
    "store",
    "scoring",
    "attribution",
    "components",
    "report",
    "service",
    "workshop",
    "evaluation",
)
