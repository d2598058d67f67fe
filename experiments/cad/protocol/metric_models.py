"""Networks that measure: transformers' classifiers, CLIP, and what gives features of pictures.

Of a folder or hub id, safetensors only, without torchvision; one that is not whole is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from concept_trak.datasets.picture import read_picture
from concept_trak.errors import UserError, remove_hint
from concept_trak.models.hashing import weights_hash
from concept_trak.models.hub import model_folder
from concept_trak.models.model_files import is_local
from concept_trak.settings import IN_CHECKOUT

EXTRA = "-e '.[protocols]'" if IN_CHECKOUT else "'concept-trak[protocols]'"
USUAL = {  # what a message offers in place of a folder that cannot be used
    "CLASSIFIER": "microsoft/resnet-50",
    "CLIP_MODEL": "openai/clip-vit-base-patch32",
    "FEATURE_MODEL": "facebook/dinov2-base",
}
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


def require(module: str) -> Any:
    """An imported module of the extra `protocols`. UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        what = module.partition(".")[0]
        absent = getattr(error, "name", "") == what
        told = "is not installed" if absent else f"does not start ({error})"
        raise UserError(f"{what} {told}; install it with: pip install {EXTRA}") from None


class Pretrained:
    """A transformers model with its image processor (and tokenizer, for CLIP).

    kind: class of transformers that loads it, e.g. "AutoModelForImageClassification". variable:
    the setting that names it, for messages. UserError for one that cannot be had or is not whole.
    """

    def __init__(self, kind: str, source: str, variable: str, device: str) -> None:
        import transformers

        self.kind, self.source, self.device, self.variable = kind, source, device, variable
        model_folder(source, variable, "config.json")
        transformers.utils.logging.disable_progress_bar()
        # without torchvision only these exist; with it they still resize as the references did
        modern = int(transformers.__version__.partition(".")[0]) >= 5
        slow = {"backend": "pil"} if modern else {"use_fast": False}
        try:
            self.model, told = getattr(transformers, kind).from_pretrained(
                source, use_safetensors=True, output_loading_info=True
            )
            self.processor = transformers.AutoImageProcessor.from_pretrained(source, **slow)
            if kind == "CLIPModel":
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except Exception as error:  # noqa: BLE001 - whatever a damaged part makes the library raise
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
            raise UserError(f"cannot load {variable}={source}: {reason}; {self._mend()}") from error
        if told["missing_keys"] or told.get("mismatched_keys"):
            lacking = sorted(map(str, told["missing_keys"] or told["mismatched_keys"]))[0]
            raise UserError(f"{variable}={source} lacks the weight {lacking}; {self._mend()}")
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise UserError(f"{variable}={source}: {name} is NaN or infinite; {self._mend()}")
        self.model.eval().requires_grad_(False).to(device)

    def _mend(self) -> str:
        hub = USUAL[self.variable] if is_local(self.source) else self.source
        get = f"from huggingface_hub import snapshot_download as d; d('{hub}', local_dir='net')"
        save = (
            f"import transformers as t; t.{self.kind}.from_pretrained('net').save_pretrained('net')"
        )
        return f'make a whole copy and set {self.variable}=net: python -c "{get}; {save}"'

    def about(self) -> dict[str, str]:
        """What measured: where it came from, and the sha256 of its weights."""
        return {"source": self.source, "weights": weights_hash([self.model])}

    def pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[n, 3, h, w] as the network takes them, on its device."""
        return self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(
            self.device
        )


def batches(paths: Sequence[Path], size: int, what: str) -> Iterator[tuple[slice, list]]:
    """(which, their pictures), `size` at a time, under a bar."""
    with tqdm(total=len(paths), desc=what, unit="picture") as bar:
        for start in range(0, len(paths), size):
            which = slice(start, start + size)
            yield which, [read_picture(path, remove_hint(path)) for path in paths[which]]
            bar.update(len(paths[which]))


class Classifier(Pretrained):
    """Names the class of a picture."""

    def __init__(self, source: str, device: str) -> None:
        super().__init__("AutoModelForImageClassification", source, "CLASSIFIER", device)
        self.labels: dict[int, str] = dict(self.model.config.id2label)

    def index(self, name: str) -> int:
        """Of a class by one of its names ("tench, Tinca tinca"). UserError if it has none such."""
        wanted = name.casefold().strip()
        for number, label in self.labels.items():
            if wanted in (part.casefold().strip() for part in str(label).split(",")):
                return number
        some = ", ".join(map(str, list(self.labels.values())[:4]))
        known = f"CLASSIFIER={self.source} has no class {name!r} (it has {some} ...)"
        raise UserError(
            f"{known}; set CLASSIFIER to one that has, e.g. CLASSIFIER={USUAL['CLASSIFIER']} for "
            "the classes of ImageNet"
        )

    @torch.no_grad()
    def top(self, paths: Sequence[Path], size: int) -> np.ndarray:
        """Number of the likeliest class of each picture, int [n]."""
        found = [
            self.model(self.pixels(pictures)).logits.argmax(1).cpu()
            for _, pictures in batches(paths, size, "classifying")
        ]
        return torch.cat(found).numpy()


class Clip(Pretrained):
    """CLIP: how well a picture fits its caption; embeddings of pictures."""

    def __init__(self, source: str, device: str) -> None:
        super().__init__("CLIPModel", source, "CLIP_MODEL", device)

    @torch.no_grad()
    def measure(
        self, paths: Sequence[Path], captions: Sequence[str], size: int
    ) -> tuple[np.ndarray, torch.Tensor]:
        """(CLIP score max(100 cos, 0) of each picture [n], embeddings of unit norm [n, d]).

        Hessel et al. 2021 without their factor 2.5, as torchmetrics has it.
        """
        length = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        scores, embeddings = [], []
        for which, pictures in batches(paths, size, "CLIP"):
            tokens = self.tokenizer(list(captions[which]), **how).to(self.device)
            given = {k: tokens[k] for k in ("input_ids", "attention_mask")}
            out = self.model(pixel_values=self.pixels(pictures), **given)
            cosine = (out.image_embeds * out.text_embeds).sum(-1)
            scores.append(100 * cosine.clamp(min=0).cpu())
            embeddings.append(out.image_embeds.cpu())
        return torch.cat(scores).double().numpy(), torch.cat(embeddings)

    @torch.no_grad()
    def of(self, paths: Sequence[Path], size: int) -> torch.Tensor:
        """Embeddings of unit norm [n, d] of pictures."""
        return _features(self, paths, size)


class FeatureExtractor(Pretrained):
    """Features of pictures by any transformers model of pictures that pools them, e.g. DINOv2."""

    def __init__(self, source: str, device: str) -> None:
        super().__init__("AutoModel", source, "FEATURE_MODEL", device)

    @torch.no_grad()
    def of(self, paths: Sequence[Path], size: int) -> torch.Tensor:
        """[n, d] of pictures."""
        return _features(self, paths, size)


def _features(network: Pretrained, paths: Sequence[Path], size: int) -> torch.Tensor:
    return torch.cat(
        [_pooled(network, pictures).cpu() for _, pictures in batches(paths, size, "features")]
    )


def _pooled(network: Pretrained, pictures: list) -> torch.Tensor:
    model, pixels = network.model, network.pixels(pictures)
    if model.config.model_type == "clip":
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
    pooled = getattr(model(pixel_values=pixels), "pooler_output", None)
    if pooled is None:
        told = f"{network.variable}={network.source} gives no pooled features"
        raise UserError(f"{told}; give another, e.g. FEATURE_MODEL=facebook/dinov2-base")
    return pooled.flatten(1)


class Inception:
    """The network of the standard FID (torch-fidelity's port of the 2015 graph), 2048 features.

    weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth, which holds tensors alone.
    Needs torch-fidelity, and that torchvision. UserError without them.
    """

    def __init__(self, weights: Path, device: str) -> None:
        from concept_trak.models.learned_tokens import read_tensors

        fid = require("torchmetrics.image.fid")
        if not weights.is_file():
            name = INCEPTION_URL.rpartition("/")[2]
            raise UserError(
                f"FEATURE_MODEL={weights} is missing; get it and set FEATURE_MODEL={name}: "
                f"curl -LO {INCEPTION_URL}"
            )
        try:
            importlib.import_module("torch_fidelity")
        except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch
            reason = " ".join(str(error).split())[:80]
            told = f"the standard FID needs torch-fidelity, which needs torchvision ({reason})"
            raise UserError(
                f"{told}; pip install torch-fidelity, or leave out FEATURE_MODEL"
            ) from None
        read_tensors(weights)  # refuses what is more than tensors, for torch-fidelity does not
        self.source, self.device = str(weights), device
        self.model = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        self.model.to(device)

    def about(self) -> dict[str, str]:
        """See `Pretrained.about`."""
        return {"source": self.source, "weights": weights_hash([self.model])}

    @torch.no_grad()
    def of(self, paths: Sequence[Path], size: int) -> torch.Tensor:
        """[n, 2048] of pictures, one at a time, since real ones differ in size."""
        found = []
        for _, (picture,) in batches(paths, 1, "Inception"):
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            found.append(self.model(pixels.to(self.device)).cpu())
        return torch.cat(found)
