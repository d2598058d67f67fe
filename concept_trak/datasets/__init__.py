"""Datasets: any folder of captioned images (`folder`), and the embedded object x style benchmark
(`emoji`).
"""

from .folder import ImageCaptionDataset, load_folder

__all__ = ["ImageCaptionDataset", "load_folder"]
