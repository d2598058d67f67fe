"""Concept attribution for diffusion models: which training images taught a concept."""
