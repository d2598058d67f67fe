"""Pictures, captions, labels: any folder (`folder`), encoded ones, and the benchmarks' own."""

from .image_folder import ImageCaptionDataset, load_folder

__all__ = ["ImageCaptionDataset", "load_folder"]
