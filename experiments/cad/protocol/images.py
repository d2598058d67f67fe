"""Pictures of the original and of the edited pipeline, drawn once and kept.

    RESULTS_DIR/protocol/pictures/{hash of model, edits, ...}/{hash of prompt, seed, ...}.png

The original's are shared by all edits and protocols. A killed run goes on where it stopped;
SHARDS of NUM_SPLIT draws a part, so that several processes or machines on one disk share the work.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from concept_trak.atomic_io import make_folder, write_bytes, write_json
from concept_trak.attribution.prompts import split_list
from concept_trak.components.edits import Edit, EditedNetwork, load_edit
from concept_trak.errors import UserError, script_hint
from concept_trak.models.sample import SamplingSettings, initial_noise, sample
from concept_trak.models.text_to_image import DTYPES, TextToImage, load_pipeline
from concept_trak.parsing import parse_shards
from concept_trak.process import log
from concept_trak.settings import Settings, as_dict, provenance, results_folder, short_hash

from .prompts import SampleRequest


def edits_of(settings: Settings) -> list[Edit]:
    """The files of EDITS. UserError where there are none, or one is no edit."""
    paths = [path for path in split_list(settings.edits) if path]
    if not paths:
        make = script_hint(
            "cad/run_erase.sh", SD_MODEL_PATH=settings.sd_model_path, PROMPT="church"
        )
        raise UserError(f"EDITS is empty; name the edit.safetensors that a run wrote: {make}")
    return [load_edit(path) for path in paths]


class PairedSampler:
    """A pipeline, and edits that are put on and taken off.

    Edits are bound to the fp32 weights that they were made for, so the pipeline is loaded and
    compared in fp32, and only then becomes DTYPE. Attributes: model (`TextToImage`), edits.
    """

    def __init__(self, settings: Settings, device: str, edits: Sequence[Edit]) -> None:
        s = self.settings = settings
        model = load_pipeline(s.sd_model_path, device, "fp32", s.lora_path)
        with EditedNetwork(model.network) as tried:  # refuses another model's before anything else
            for edit in edits:
                tried.apply(edit)
        identity = model.identity()
        model.pipe.to(DTYPES[s.dtype])
        self.model = TextToImage(model.pipe, model.source, model.hashes)
        self.edits, self._base = list(edits), tried.base
        self._decides = {"model": identity, "steps": s.gen_num_inference_steps, "dtype": s.dtype}
        self._decides |= {"negative_prompt": s.negative_prompt, "torch": torch.__version__}
        self._decides["device"] = torch.device(device).type

    def paths(self, asks: Sequence[SampleRequest], edited: bool) -> list[Path]:
        """Where each picture is, or will be."""
        made = self._decides | {"edits": [e.digest() for e in self.edits] if edited else []}
        below = results_folder(self.settings, "protocol/pictures")
        folder = make_folder(below / short_hash(made))
        if not (folder / "made.json").exists():
            told = {"decides": made, "settings": as_dict(self.settings)}
            write_json(folder / "made.json", told | {"provenance": provenance()})
        return [folder / f"{short_hash([a.prompt, a.seed, a.guidance])}.png" for a in asks]

    def draw(self, asks: Sequence[SampleRequest], edited: bool) -> list[Path]:
        """Draw what is missing of this process's shards; returns where every picture is."""
        s, paths = self.settings, self.paths(asks, edited)
        shards = set(parse_shards(s.shards, s.num_split))
        mine = [i for i in range(len(asks)) if i % s.num_split in shards or not s.shards]
        missing = [i for i in mine if not paths[i].exists()]
        name = "edited" if edited else "original"
        log(f"{name}: {len(missing)} pictures to draw, {len(mine) - len(missing)} are there")
        missing.sort(key=lambda i: asks[i].guidance)
        with EditedNetwork(self.model.network, self._base) as network:
            for edit in self.edits if edited else ():
                network.apply(edit)
            with tqdm(total=len(missing), desc=f"drawing, {name}", unit="picture") as bar:
                for _, same in groupby(missing, key=lambda i: asks[i].guidance):
                    of_one = list(same)  # a batch has one guidance
                    for start in range(0, len(of_one), s.batch_size):
                        batch = of_one[start : start + s.batch_size]
                        self._draw([asks[i] for i in batch], [paths[i] for i in batch])
                        bar.update(len(batch))
        return paths

    def _draw(self, asks: list[SampleRequest], paths: list[Path]) -> None:
        s, model = self.settings, self.model
        noise = torch.cat([initial_noise(model.latent_shape, ask.seed) for ask in asks])
        how = SamplingSettings(asks[0].guidance, s.gen_num_inference_steps, s.negative_prompt)
        x0 = sample(model, [ask.prompt for ask in asks], noise, how, len(asks))
        for ask, latent in zip(asks, x0, strict=True):
            if not latent.isfinite().all():
                told = f"the picture of {ask.prompt[:60]!r} (seed {ask.seed}) is NaN or infinite"
                raise UserError(f"{told}; set DTYPE=fp32")
        for path, picture in zip(paths, model.decode(x0), strict=True):
            png = io.BytesIO()
            picture.save(png, "png")
            write_bytes(path, png.getvalue())
