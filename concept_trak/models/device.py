"""Where to compute."""

from __future__ import annotations

import warnings

import torch

from ..errors import UserError


def pick_device(device: str, gpu_id: str) -> str:
    """DEVICE if set; else GPU `gpu_id` or the first GPU; else the CPU. UserError for a device that
    is not there.
    """
    wanted = device or (
        f"cuda:{gpu_id}" if gpu_id else "cuda:0" if torch.cuda.is_available() else "cpu"
    )
    try:  # some devices take a tensor and compute nothing, or do not give it back
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            works = (torch.ones(2, device=wanted) + 1).tolist() == [2.0, 2.0]
    except Exception:  # of what torch knows by name alone, each has an error of its own
        works = False
    if not works:
        count = torch.cuda.device_count()
        raise UserError(
            f"device {wanted!r} is not available ({count} GPUs here); unset GPU_ID and DEVICE or "
            "set DEVICE=cpu"
        )
    return "cpu" if torch.device(wanted).type == "cpu" else wanted  # cpu:0 is no other
