"""The certificate of an edit.

RESULTS_DIR/cad/verify-{concept}-{hash}/
edit.safetensors     the edit (`components.edits`)
certificate.json     verdict, figures, probes, every plan tried; the file's sha256
certificate.html     the same as a page, with pictures before and after
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
from PIL import Image

from concept_trak.atomic_io import write_bytes
from concept_trak.attribution.prompts import slug
from concept_trak.attribution.task import AttributionTask
from concept_trak.components.edits import Edit, save_edit
from concept_trak.report.page import environment, pairs
from concept_trak.settings import Settings, as_dict, provenance, results_folder
from experiments.benchmark.results import result_folder, write_metrics

from .testbed import EraseSetup, Target
from .verify import EraseGoal, target_of, verify

OF_TARGET, OF_OTHERS = 6, 12  # pictures shown
SEED = 250_000
EDIT, FACTS, PAGE = "edit.safetensors", "certificate", "certificate.html"


def certify(settings: Settings, device: str) -> dict[str, Any]:
    """Search and probe an edit, write its folder; returns the certificate."""
    setup, s = EraseSetup(AttributionTask(settings, device)), settings
    target, goal = target_of(setup), EraseGoal(s.target_ua, s.min_retention, s.judged)
    found, edit = verify(setup, target, goal)
    shown = pictures(setup, target, edit)
    made_from = [setup.model.identity(), setup.task.data.content_hash(), target.name]
    made_from += [goal.target_ua, goal.min_retention, goal.pictures]
    with result_folder(s, "cad", f"verify-{slug(target.name, 32)}", made_from) as folder:
        save_edit(folder / EDIT, edit)
        whole = hashlib.sha256((folder / EDIT).read_bytes()).hexdigest()
        found["edit"] |= {"file": EDIT, "sha256": whole}
        write_metrics(folder, FACTS, found, s)
        write_bytes(folder / PAGE, page(found, shown, s).encode())
    print(found["says"])
    print(found["behind"])
    latest = results_folder(s, "cad") / "latest" / PAGE
    print(f"certificate: {os.path.relpath(latest)}")
    return found


Shown = list[tuple[str, Image.Image, Image.Image]]


def pictures(setup: EraseSetup, target: Target, edit: Edit) -> tuple[Shown, Shown]:
    """(caption, before, after) at equal noise: of the concept, and of everything else."""
    kept = [setup.pool[i] for i in setup.kept(target, OF_OTHERS)]
    records = [*setup.prompts(target, OF_TARGET), *kept]
    seeds = range(SEED, SEED + len(records))
    before = setup.draw(records, seeds).pictures
    setup.mirror(edit)
    try:
        after = setup.draw(records, seeds).pictures
    finally:
        setup.mirror(edit, undo=True)
    captions = [r["text"] for r in records]
    shown = [(c, _image(b), _image(a)) for c, b, a in zip(captions, before, after, strict=True)]
    return shown[:OF_TARGET], shown[OF_TARGET:]


def _image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture)


def page(found: dict[str, Any], shown: tuple[Shown, Shown], settings: Settings) -> str:
    """certificate.html."""
    records = {"Settings": pairs(as_dict(settings)), "Provenance": pairs(provenance())}
    groups = [("The concept", shown[0]), ("Everything else", shown[1])]
    template = environment().get_template("certificate.html.jinja")
    return template.render(found=found, groups=groups, records=records)
