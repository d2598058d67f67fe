"""Images, captions, labels: any folder (`image_folder`), encoded, or in memory (`given`)."""

from .image_folder import ImageCaptionDataset, load_folder

__all__ = ["ImageCaptionDataset", "load_folder"]
