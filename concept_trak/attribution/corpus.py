"""A model and the training pictures it is attributed to, whichever way they lie on disk."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import torch

from ..datasets import encoded as abc
from ..datasets.folder import ImageCaptionDataset, load_folder
from ..errors import UserError
from ..models.text_to_image import TextToImage, load_pipeline
from ..rows.projection import projection_for
from ..rows.vjp import PerSampleVjp
from ..settings import Settings
from .adopt import resolve_mask


class FolderData:
    """Pictures and captions of a folder (`datasets.folder`), encoded by the model itself.

    Attributes: everything, all pictures; pictures, its train split.
    """

    def __init__(self, root: str, model: TextToImage):
        self.everything, self.model = load_folder(root), model
        self.pictures = self.everything.split("train")
        if not len(self.pictures):
            raise UserError(
                f"{root} has no picture in its train split; check the split column of its metadata"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def latents(self) -> torch.Tensor:
        """[N, C, h, w] scaled latents on the CPU, encoded once in batches: N C h w 4 bytes. For
        more, see `prepare`.
        """
        size, step, n = self.model.image_size, 64, len(self)
        return torch.cat(
            [
                self.model.encode_images(
                    self.pictures.images(range(i, min(i + step, n)), size=size)
                ).cpu()
                for i in range(0, n, step)
            ]
        )

    def batch(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0 [b, C, h, w], cond [b, T, d]) of consecutive train pictures, on the model's device."""
        return self.latents[rows.start : rows.stop].to(
            self.model.device
        ), self.model.encode_prompts([self.pictures.captions[i] for i in rows])

    def content_hash(self) -> str:
        """Of the train pictures and captions; see `ImageCaptionDataset`."""
        return self.pictures.content_hash()


class Corpus:
    """A model, its training data and the settings they are used under.

    Attributes: data, a FolderData or `datasets.abc.EncodedData`: `len(data)`, `data.batch(rows)`,
    `data.content_hash()`.
    """

    def __init__(self, settings: Settings, device: str):
        self.settings, self.device = settings, device
        self.model = load_pipeline(
            settings.sd_model_path, device, settings.dtype, settings.lora_path
        )
        encoded = (Path(settings.data_dir) / abc.LATENTS).exists()
        self.data = (
            abc.EncodedData(settings.data_dir, self.model, settings.num_train)
            if encoded
            else FolderData(settings.data_dir, self.model)
        )

    @property
    def train(self) -> ImageCaptionDataset:
        """The train pictures, row i of a store being picture i."""
        return self.data.pictures

    @property
    def everything(self) -> ImageCaptionDataset:
        """The train pictures and, where there is a split, those held out."""
        return self.data.everything

    @property
    def latents(self) -> torch.Tensor:
        """[N, C, h, w] of the train pictures."""
        return self.data.latents

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The selected parameters, in coordinate order."""
        return PerSampleVjp(self.model.network, self.settings.layer).parameters

    @cached_property
    def projection(self):
        """The settings' projection for the selected parameters of this model."""
        mask = self.__dict__.get("mask") or resolve_mask(self.settings.proj_mask, None)
        return projection_for(self.parameters, self.settings, self.device, mask)

    def use_mask(self, mask: str) -> None:
        """Project with this mask (`gpu_mask`) from now on: a store was made with it."""
        if self.__dict__.get("mask") != mask:
            self.__dict__.pop("projection", None)
            self.mask = mask

    def with_settings(self, settings: Settings) -> Corpus:
        """The same model, pictures and latents under other settings."""
        other = copy.copy(self)
        for name in ("parameters", "projection"):
            other.__dict__.pop(name, None)
        other.settings = settings
        return other
