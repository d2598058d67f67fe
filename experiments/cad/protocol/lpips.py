"""LPIPS: how different two pictures look (Zhang et al. 2018, arXiv 1801.03924), with AlexNet.

    d(x, y) = sum_l mean_hw sum_c w_lc (u_l(x) - u_l(y))_chw^2,    u_l = f_l / sqrt(1e-8 + |f_l|^2)

f_l is the output of the l-th of AlexNet's five convolutions after its ReLU, w_l >= 0 are the linear
heads that the authors fitted to human judgements. Written from the equation, for the packages that
have it (lpips, torchmetrics) take AlexNet's layers from torchvision; equal to torchmetrics' on
equal weights (test). The heads come with torchmetrics, AlexNet's weights from the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from concept_trak.errors import UserError
from concept_trak.models.hashing import weights_hash
from concept_trak.models.learned_tokens import read_tensors

from .metric_models import batches, require

SIZE = 64  # pixels, as the published protocol compares
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
READ_AT = (1, 4, 7, 9, 11)  # the ReLUs among AlexNet's features
WIDTHS = (64, 192, 384, 256, 256)
URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
MEND = (
    f"get AlexNet's weights (233 MB) and set ALEXNET_PATH=alexnet-owt-7be5be79.pth: curl -LO {URL}"
)


def alexnet_features() -> nn.Sequential:
    """AlexNet's convolutions in their one-column form (Krizhevsky 2014, arXiv 1404.5997), without
    weights of use; layers are numbered as in the file of MEND.
    """
    pool = (3, 2)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(*pool)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(*pool)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


class LPIPS:
    """Distance of pairs of pictures. weights: AlexNet's, .pth (tensors alone) or .safetensors.

    UserError where they or torchmetrics are missing, or are another network's.
    """

    def __init__(self, weights: str, device: str) -> None:
        if not weights:
            raise UserError(f"ALEXNET_PATH is empty; {MEND}")
        folder = Path(require("torchmetrics").__file__).parent / "functional/image/lpips_models"
        self.device, self.source, self.net = device, weights, alexnet_features()
        heads = read_tensors(folder / "alex.pth")
        self.heads = [heads[f"lin{i}.model.1.weight"].to(device) for i in range(len(WIDTHS))]
        self._load(Path(weights))
        self.net.eval().requires_grad_(False).to(device)
        self.shift, self.scale = (
            torch.tensor(v, device=device).view(3, 1, 1) for v in (SHIFT, SCALE)
        )

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"ALEXNET_PATH={path} is missing; {MEND}")
        given = read_tensors(path)
        own = self.net.state_dict()
        try:
            own = {name: given[f"features.{name}"] for name in own}
            if not all(value.isfinite().all() for value in own.values()):
                raise ValueError("a NaN or infinite value")
            self.net.load_state_dict(own)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is not AlexNet ({reason}); {MEND}") from None

    def about(self) -> dict[str, str]:
        """What measured: where it came from, and the sha256 of its weights."""
        return {"source": self.source, "weights": weights_hash([self.net])}

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """u_l [n, C_l, h_l, w_l] of pictures in [-1, 1], [n, 3, h, w]."""
        x, found = (x - self.shift) / self.scale, []
        for number, layer in enumerate(self.net):
            x = layer(x)
            if number in READ_AT:
                found.append(x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt())
        return found

    @torch.no_grad()
    def distance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """d [n] of pictures in [-1, 1], [n, 3, h, w] each, as they are."""
        parts = zip(self.heads, self.features(x), self.features(y), strict=True)
        return sum((w * (u - v).square()).sum(1).mean((1, 2)) for w, u, v in parts)

    def of(self, one: Sequence[Path], other: Sequence[Path], size: int) -> np.ndarray:
        """d [n] of pairs of pictures at SIZE pixels, `size` pairs at a time."""
        sides = zip(batches(one, size, "LPIPS"), batches(other, size, "LPIPS, edited"), strict=True)
        found = [self.distance(self._pixels(a), self._pixels(b)) for (_, a), (_, b) in sides]
        return torch.cat(found).double().cpu().numpy()

    def _pixels(self, pictures: list) -> torch.Tensor:
        x = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).to(self.device)
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
        larger = min(x.shape[-2:]) > SIZE
        how = {"mode": "area"} if larger else {"mode": "bilinear", "align_corners": False}
        return interpolate(x, (SIZE, SIZE), **how)
