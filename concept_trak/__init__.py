"""Concept attribution for diffusion models: which training images taught a concept."""

import os

# Read by the libraries when they are imported: their notes on optional packages would bury our one line for a user's mistake.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
