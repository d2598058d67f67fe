"""Where to compute."""

from __future__ import annotations

import torch

from ..errors import UserError


def pick_device(device: str, gpu_id: str) -> str:
    """DEVICE if set; else GPU `gpu_id` or the first GPU; else the CPU. UserError for a device that
    is not there.
    """
    wanted = device or (
        f"cuda:{gpu_id}" if gpu_id else "cuda:0" if torch.cuda.is_available() else "cpu"
    )
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        raise UserError(
            f"device {wanted!r} is not available ({count} GPUs here); unset GPU_ID and DEVICE or "
            "set DEVICE=cpu"
        ) from error
    return wanted
