"""A model and the training pictures it is attributed to, whichever way they lie on disk."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..datasets import encoded
from ..datasets.image_folder import ImageCaptionDataset, load_folder
from ..errors import UserError
from ..gradients.compute import GradientComputer
from ..gradients.projection import Projection, projection_for
from ..gradients.vjp import PerSampleVjp
from ..models.condition import Condition
from ..models.hashing import weights_hash
from ..models.load import load_model
from ..models.text_to_image import TextToImage, load_pipeline
from ..parsing import parse_memory
from ..registry import OBJECTIVES
from ..scoring.fisher import fisher_for
from ..scoring.preconditioner import Budget, Preconditioner
from ..settings import Settings
from .find_store import resolve_mask_for
from .naming import gradient_settings

ENCODED_TOGETHER = 64  # pictures


class ImageFolderData:
    """Pictures and captions of a folder (`datasets.image_folder`), encoded by the model itself.

    Attributes: everything, all pictures; pictures, its train split; apart, whether only the
    pictures that are asked for are encoded, by one of many who share the work.
    """

    apart = False

    def __init__(self, root: str, model: TextToImage) -> None:
        self.everything, self.model = load_folder(root), model
        self._kept: dict[int, torch.Tensor] = {}  # the blocks of the last batch
        self.pictures = self.everything.split("train")

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def latents(self) -> torch.Tensor:
        """[N, C, h, w] scaled latents on the CPU, encoded once in batches: N C h w 4 bytes.

        For more, see `prepare`.
        """
        blocks = range(-(-len(self) // ENCODED_TOGETHER))
        return torch.cat([self._encoded(block) for block in blocks])

    def _encoded(self, block: int) -> torch.Tensor:
        """[b, C, h, w] of the block's pictures: those encoded together, whoever wants them."""
        first = block * ENCODED_TOGETHER
        rows = range(first, min(first + ENCODED_TOGETHER, len(self)))
        return self.model.encode_images(self.pictures.images(rows, self.model.image_size)).cpu()

    def _latents(self, rows: range) -> torch.Tensor:
        """[b, C, h, w] of consecutive pictures; of their blocks, if they are encoded apart."""
        if not self.apart:
            return self.latents[rows.start : rows.stop]
        blocks = range(rows.start // ENCODED_TOGETHER, (rows.stop - 1) // ENCODED_TOGETHER + 1)
        first = blocks.start * ENCODED_TOGETHER
        self._kept = {b: self._kept[b] if b in self._kept else self._encoded(b) for b in blocks}
        return torch.cat([*self._kept.values()])[rows.start - first : rows.stop - first]

    def batch(self, rows: range) -> tuple[torch.Tensor, Condition]:
        """x0 [b, C, h, w] and captions of consecutive train pictures, on the model's device."""
        cond = self.model.encode_prompts([self.pictures.captions[i] for i in rows])
        return self._latents(rows).to(self.model.device), cond

    def content_hash(self) -> str:
        """Of the train pictures and captions; see `ImageCaptionDataset`."""
        return self.pictures.content_hash()

    def shown_hash(self) -> str:
        """Empty: these rows are made of the pictures themselves; see `EncodedData.shown_hash`."""
        return ""

    def digests(self) -> list[str]:
        """Of each train picture and its caption; see `ImageCaptionDataset`."""
        return self.pictures.digests()


class AttributionTask:
    """A model, its training data and the settings they are used under. model: one that is loaded
    already, in place of SD_MODEL_PATH.

    Attributes: data, a FolderData or `datasets.encoded.EncodedData`: `len(data)`,
    `data.batch(rows)`, `data.content_hash()`, `data.digests()`, `data.shown_hash()`.
    """

    def __init__(self, settings: Settings, device: str, model: TextToImage | None = None) -> None:
        s, self.device = settings, device
        self.settings = settings
        self.model = model or load_model(s.sd_model_path, device, s.dtype, s.lora_path)
        if (Path(s.data_dir) / encoded.LATENTS).exists():
            self.data = encoded.EncodedData(s.data_dir, self.model, s.num_train)
        else:
            self.data = ImageFolderData(s.data_dir, self.model)

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
    def cond_null(self) -> Condition:
        """Of the empty prompt, whose encoding no learned word changes."""
        return self.model.encode_prompts([""])

    @property
    def fit_judge(self) -> TextToImage | None:
        """The model of FIT_MODEL_PATH; None where it is empty, or F asks for none.

        UserError for one of another autoencoder or schedule.
        """
        asked = self.settings.fit_model_path and OBJECTIVES.get(self.settings.f).beside
        return self._fit_model if asked else None

    @cached_property
    def _fit_model(self) -> TextToImage:
        s = self.settings
        try:
            judge = load_pipeline(s.fit_model_path, self.device, s.dtype)
        except UserError as error:
            told = str(error).replace("SD_MODEL_PATH", "FIT_MODEL_PATH")
            raise UserError(told) from None
        both = (self.model, judge)
        encoders = {weights_hash((model.pipe.vae.encoder,)) for model in both}
        levels = {tuple(model.schedule.level(t) for t in (100, 500, 900)) for model in both}
        if len(encoders) > 1 or len(levels) > 1:
            raise UserError(
                f"FIT_MODEL_PATH={s.fit_model_path} has another autoencoder or noise schedule than "
                f"{s.sd_model_path}, so it cannot judge its latents; set FIT_MODEL_PATH to a "
                "pipeline of its family"
            )
        return judge

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The selected parameters, in coordinate order."""
        return PerSampleVjp(self.model.network, self.settings.layer).parameters

    @cached_property
    def projection(self) -> Projection:
        """Of the selected parameters, as the settings say, under the mask of the store there is.

        UserError when that is another than PROJ_MASK, or not clear.
        """
        wanted = self.origin() | {"data": self.data.content_hash()}
        mask = resolve_mask_for(self.settings, wanted, self.parameters)
        return projection_for(self.parameters, self.settings, self.device, mask)

    @property
    def row_maker(self) -> GradientComputer:
        """Of the settings' parameters, projection and norm, for this model."""
        s = self.settings
        return GradientComputer(self.model, self.projection, s.layer, s.normalize)

    @property
    def preconditioner(self) -> Preconditioner:
        """Of this projection's blocks, within MAX_MEMORY."""
        budget = Budget(parse_memory(self.settings.max_memory), self.device)
        return fisher_for(self.projection.widths, budget)

    def identity(self, **made_from: Any) -> dict[str, Any]:
        """Everything that a kept row depends on, JSON: settings of a row, model, projection, and
        what else it was `made_from` (pictures, a question, learned words).

        The one identity of stores and caches. BATCH_SIZE and MAX_MEMORY are not part of it: they
        change nothing but speed and memory.
        """
        return self.origin() | {"projection": self.projection.describe(), **made_from}

    def train_identity(self) -> dict[str, Any]:
        """What a store of this task must have been made from."""
        return self.identity(data=self.data.content_hash())

    def origin(self) -> dict[str, Any]:
        """What a row depends on beside its projection."""
        judge = self.fit_judge
        own = {"rows": gradient_settings(self.settings), "model": self.model.identity()}
        return own | ({} if judge is None else {"fit_judge": judge.identity()})

    def with_data(self, data: Any) -> AttributionTask:
        """The same model and settings with other data; see `data` in the class."""
        other = self._anew()
        other.data = data
        return other

    def with_settings(self, settings: Settings) -> AttributionTask:
        """The same model, pictures and latents under other settings."""
        other = self._anew()
        other.settings = settings
        return other

    def _anew(self) -> AttributionTask:
        """A copy without what settings and data decide: their store may have another mask."""
        other = copy.copy(self)
        for name in ("parameters", "projection"):
            other.__dict__.pop(name, None)
        return other
