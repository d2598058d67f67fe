"""Training pictures whose caption the model contradicts, for whoever owns the data.

suspects.csv    rank, fit, file_name, caption of all below `gradients.caption_fit.MIDDLE`, the
worst first suspects.jpg    the first of them
suspects.json   how many, with the settings and versions that made it
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..atomic_io import atomic_folder, link, write_bytes, write_json
from ..attribution.answer import caption_fits
from ..attribution.naming import settings_digest
from ..attribution.task import AttributionTask
from ..attribution.train_grad import open_store
from ..errors import UserError
from ..gradients.caption_fit import MIDDLE
from ..settings import as_dict, provenance, results_folder
from .pictures import load_pictures, picture_grid
from .results import image_bytes
from .tables import csv_bytes

SHOWN = 40  # pictures of the grid
HEADER = ("rank", "fit", "file_name", "caption")


def rank_mismatched_captions(task: AttributionTask) -> Path:
    """Write RESULTS_DIR/suspects/{hash}/ and print its beginning; returns the folder.

    UserError where the rows do not tell how well captions fit (F=contrast_llr does).
    """
    store, data = open_store(task), task.train
    s = task.settings
    fit = caption_fits(task, store)
    if fit is None:
        raise UserError(f"rows of F={s.f} do not tell how captions fit; use F=contrast_llr")
    order = np.argsort(fit, kind="stable")
    found = [int(i) for i in order if fit[i] < MIDDLE]
    names = [str(data.records[i].get("file_name", i)) for i in found]
    rows = [
        (rank, f"{fit[i]:.3f}", name, " ".join(data.captions[i].split()))
        for rank, (i, name) in enumerate(zip(found, names, strict=True), 1)
    ]
    folder = results_folder(s, "suspects") / settings_digest(s, store.checksum)
    with atomic_folder(folder) as made:
        write_bytes(made / "suspects.csv", csv_bytes(HEADER, rows))
        if found:
            write_bytes(made / "suspects.jpg", _grid(task, fit, found[:SHOWN]))
        counts = {"pictures": len(fit), "suspects": len(found), "below": MIDDLE}
        made_by = {"settings": as_dict(s), "provenance": provenance()}
        write_json(made / "suspects.json", counts | made_by)
    link(folder.parent / "latest", folder)
    print(f"{len(found)} of {len(fit)} captions explain their picture not half as well as most")
    for row in rows[:SHOWN]:
        print("\t".join(map(str, row)))
    return folder


def _grid(task: AttributionTask, fit: np.ndarray, indices: list[int]) -> bytes:
    pictures = load_pictures(task.train, indices)
    captions = [" ".join(task.train.captions[i].split()) for i in indices]
    notes = [f"{rank}   fit {fit[i]:.2f}" for rank, i in enumerate(indices, 1)]
    return image_bytes(picture_grid([pictures[i] for i in indices], captions, notes), "JPEG")
