"""Encode a folder of pictures and captions once, in the layout of `datasets.abc`: latents and text
embeddings as arrays.

laion_latents.npy [2 N, C, h, w]    posterior means of the VAE x scaling factor; row N + i is picture i mirrored
laion_text_embeddings.npy [N, T, d]
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError
from ..files import disk_errors, write_json
from ..models.text_to_image import load_pipeline
from ..settings import Settings, provenance
from .encoded import LATENTS, PREPARED, TEXT
from .folder import load_folder


def prepare(settings: Settings, device: str) -> Path:
    """Encode the train split of SOURCE_DIR into DATA_DIR (made if missing), which is returned;
    nothing to do when that was done already.

    Arrays are float16 and get their names when complete; N (2 C h w + T d) 2 bytes. A killed run
    begins again. Raises UserError for unreadable pictures, and a full disk.
    """
    source, folder = settings.source_dir, Path(settings.data_dir)
    if not source:
        raise UserError(
            "SOURCE_DIR is not set; give a folder of pictures with metadata.jsonl, metadata.csv "
            "or captions.txt"
        )
    model, data = (
        load_pipeline(settings.sd_model_path, device, settings.dtype, settings.lora_path),
        load_folder(source).split("train"),
    )
    made_from = {
        "source": str(Path(source).resolve()),
        "pictures": data.content_hash(),
        "model": model.weight_hash(),
        "rows": len(data),
    }
    record = folder / PREPARED
    if (
        record.exists()
        and {k: json.loads(record.read_text()).get(k) for k in made_from} == made_from
    ):
        return folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        n, size, step = len(data), model.image_size, settings.batch_size
        text_shape = tuple(model.encode_prompts([""]).shape[1:])
        size_in_bytes = 2 * n * int(2 * np.prod(model.latent_shape) + np.prod(text_shape))
        print(f"{folder}: {n} pictures, {size_in_bytes / 1e6:.0f} MB when complete")
        if (
            free := shutil.disk_usage(folder).free
        ) < size_in_bytes:  # asked first: a mapped file on a full disk ends the process by a signal
            raise UserError(
                f"{folder} has {free / 1e6:.0f} MB free but {size_in_bytes / 1e6:.0f} MB are "
                "needed; free some or choose another folder"
            )
        parts = {name: folder / f"{name}.part" for name in (LATENTS, TEXT)}
        latents = np.lib.format.open_memmap(
            parts[LATENTS], "w+", np.float16, (2 * n, *model.latent_shape)
        )
        text = np.lib.format.open_memmap(parts[TEXT], "w+", np.float16, (n, *text_shape))
        for start in tqdm(range(0, n, step), desc="encoding", unit=f" x {step} pictures"):
            rows = range(start, min(start + step, n))
            pixels = data.images(rows, size=size)
            for offset, batch in ((0, pixels), (n, pixels[:, :, ::-1])):
                latents[start + offset : rows.stop + offset] = _finite(model.encode_images(batch))
            text[start : rows.stop] = _finite(
                model.encode_prompts([data.captions[i] for i in rows])
            )
        for array, name in ((latents, LATENTS), (text, TEXT)):
            array.flush()
            parts[name].replace(folder / name)
    write_json(
        record,
        {
            **made_from,
            "settings": {"sd_model_path": settings.sd_model_path, "dtype": settings.dtype},
            "provenance": provenance(),
        },
    )
    return folder


def _finite(x: torch.Tensor) -> np.ndarray:
    """float16 copy of a batch. UserError if it holds a NaN or overflows."""
    values = x.float().cpu().numpy().astype(np.float16)
    if not np.isfinite(values).all():
        raise UserError(
            "an encoded picture or caption is NaN or too large for float16; use DTYPE=fp32"
        )
    return values
