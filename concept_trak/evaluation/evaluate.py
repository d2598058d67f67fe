"""Does it work: attribute many queries with every method, and compare the top ten with the labels.

Queries: every held-out (object, style) cell (OOD), as many seen cells (ID), and other seen cells
that choose the damping (tune). Query kinds: `generated` (states from the picture's own x_T) and
`real` (the real picture of the cell; states are its noisings). Each method has one damping, chosen
on the tune cells (generated) and used for everything; the best one per table is named oracle.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..attribution.attribute import query_states
from ..attribution.corpus import Corpus
from ..attribution.methods import METHODS, settings_for
from ..attribution.prompts import contrasts
from ..attribution.train_grad import dsm_losses, identity, open_store, train_grad
from ..datasets import emoji
from ..errors import UserError
from ..files import write_json
from ..models.ddim import ddim_sample
from ..parsing import parse_memory
from ..rows import query
from ..scoring import fisher, metrics, scores
from ..settings import DAMPINGS, as_dict, digest, provenance
from ..store.shards import Store
from . import controls

CONCEPTS = ("object", "style")
KINDS = ("generated", "real")


@dataclass(frozen=True)
class Cell:
    """One query: its row in the whole data set, caption, and the words of its concepts."""

    row: int
    caption: str
    words: dict[str, str]


def choose_cells(corpus: Corpus) -> dict[str, list[Cell]]:
    """{"ood", "id", "tune"}: held-out cells; equally many seen cells; others, a third as many, to
    choose dampings on.

    Seen cells are drawn with a fixed seed, disjointly. `num_queries` (0: all) bounds the number of
    OOD and of ID cells.
    """
    data = corpus.everything
    rows = {
        split: [i for i, r in enumerate(data.records) if r.get("split") == split]
        for split in ("held_out", "train")
    }
    shuffle = np.random.default_rng(0)
    ood, seen = shuffle.permutation(rows["held_out"]), shuffle.permutation(rows["train"])
    n = corpus.settings.num_queries or len(ood)
    tune = max(8, n // 3)

    def cells(chosen):
        return [
            Cell(int(i), data.captions[i], {c: data.records[i][f"{c}_phrase"] for c in CONCEPTS})
            for i in chosen
        ]

    return {
        "ood": cells(ood[:n]),
        "id": cells(seen[:n]),
        "tune": cells(seen[len(ood) : len(ood) + tune]),
    }


class Pictures:
    """The pictures asked about, one a cell: generated from the settings' seed (all from the same
    x_T), or the real ones.
    """

    def __init__(self, corpus: Corpus, cells: list[Cell]):
        self.corpus, self.cells = corpus, cells
        generator = torch.Generator().manual_seed(corpus.settings.seed)
        self.x_T = torch.randn(1, *corpus.model.latent_shape, generator=generator).to(
            corpus.model.device, corpus.model.dtype
        )

    @functools.cached_property
    def latents(self) -> dict[str, torch.Tensor]:
        """{kind: [cells, C, h, w]}."""
        model, size = self.corpus.model, self.corpus.model.image_size
        real = model.encode_images(
            self.corpus.everything.images([cell.row for cell in self.cells], size=size)
        )
        return {"generated": self._generate(), "real": real}

    @functools.cached_property
    def pixels(self) -> dict[str, np.ndarray]:
        """{kind: uint8 [cells, H, W, 3]}."""
        model = self.corpus.model
        real = self.corpus.everything.images(
            [cell.row for cell in self.cells], size=model.image_size
        )
        return {
            "generated": np.stack([np.asarray(p) for p in model.decode(self.latents["generated"])]),
            "real": real,
        }

    def _generate(self) -> torch.Tensor:
        s, model, done = self.corpus.settings, self.corpus.model, []
        for start in tqdm(range(0, len(self.cells), s.batch_size), desc="queries to generate"):
            cond = model.encode_prompts(
                [cell.caption for cell in self.cells[start : start + s.batch_size]]
            )
            null, x_T = (
                model.encode_prompts([s.negative_prompt]).expand_as(cond),
                self.x_T.expand(len(cond), -1, -1, -1),
            )
            done.append(
                ddim_sample(
                    model,
                    x_T,
                    cond,
                    null,
                    scale=s.gen_guidance_scale,
                    num_steps=s.gen_num_inference_steps,
                )[0]
            )
        return torch.cat(done)


class QueryRows:
    """Query gradients of one method and kind over all cells, in a store of their own: resumed when
    killed, reused when unchanged.
    """

    def __init__(self, corpus: Corpus, name: str, kind: str, pictures: Pictures):
        self.corpus, self.name, self.kind, self.pictures, self.cells = (
            corpus,
            name,
            kind,
            pictures,
            pictures.cells,
        )
        self.method, self.s, self.model = METHODS[name], corpus.settings, corpus.model
        self.per_cell = len(CONCEPTS) if self.method.per_concept else 1

    def states(self) -> query.QueryStates:
        """Concept-TRAK reads trajectories from x_T of a generated picture; noisings of a picture
        serve everything else.
        """
        noisings = self.kind == "real" or not self.method.per_concept
        return query_states(dataclasses.replace(self.s, scope="local") if noisings else self.s)

    def compute(self, index: int) -> np.ndarray:
        """[per_cell, k] rows of one cell."""
        model, s, cell = self.model, self.s, self.cells[index]
        x_T, x0 = self.pictures.x_T, self.pictures.latents[self.kind][index : index + 1]
        pairs = contrasts(s.query_form, cell.caption, list(cell.words.values()))
        cond, cond_null, *conds = model.encode_prompts([cell.caption, "", *sum(pairs, ())]).split(1)
        states = [
            *query.read_states(
                model, self.states(), cond, cond_null, x_T=x_T, x0=x0, batch_size=s.batch_size
            )
        ]
        projection = self.corpus.projection
        if self.method.per_concept:
            rows = torch.cat(
                [
                    query.concept_gradient(
                        model,
                        projection,
                        states,
                        plus,
                        minus,
                        layer=s.layer,
                        normalize=s.normalize,
                        two_sided=s.two_sided,
                        batch_size=s.batch_size,
                    )
                    for plus, minus in zip(conds[::2], conds[1::2])
                ]
            )
        else:
            rows = query.image_gradient(
                model,
                projection,
                states,
                cond,
                self.method.f,
                layer=s.layer,
                normalize=self.method.normalize,
                batch_size=s.batch_size,
            )
        return rows.cpu().numpy()

    def load(self) -> np.ndarray:
        """[cells, per_cell, k], computing what is missing."""
        s = self.s
        made_from = {
            "method": self.name,
            "kind": self.kind,
            "cells": [c.caption for c in self.cells],
            "corpus": identity(self.corpus),
            "states": dataclasses.asdict(self.states()),
            "form": s.query_form,
            "gen": [s.gen_guidance_scale, s.gen_num_inference_steps, s.seed],
        }
        folder = Path(s.grad_dir) / f"queries-{self.name}-{self.kind}-{digest(made_from)}"
        store = Store.create(
            folder,
            len(self.cells) * self.per_cell,
            self.corpus.projection.proj_dim,
            1,
            "float32",
            made_from,
        )
        for cell in tqdm(
            range(store.resume_row(0) // self.per_cell, len(self.cells)),
            desc=f"queries {self.name} {self.kind}",
        ):
            store.append(0, self.compute(cell), cell * self.per_cell)
        store.finish(0)
        return store.rows(range(store.num_rows)).reshape(len(self.cells), self.per_cell, -1)


def train_store(corpus: Corpus) -> Store:
    """The train rows of the corpus' settings: the committed or an earlier store, else computed now."""
    try:
        return open_store(corpus)
    except UserError:  # missing or unfinished; a store of something else is refused again below
        return train_grad(corpus)


def method_scores(corpus: Corpus, name: str, kind: str, pictures: Pictures) -> np.ndarray:
    """[D, cells, concepts, N] scores of one method at all dampings."""
    settings = settings_for(METHODS[name], corpus.settings)
    own = corpus.with_settings(settings)
    store, rows = train_store(own), QueryRows(own, name, kind, pictures).load()
    memory = parse_memory(settings.max_memory)
    solved = fisher.precondition(
        store,
        rows.reshape(-1, rows.shape[-1]),
        DAMPINGS,
        memory,
        device=corpus.device,
        widths=own.projection.widths,
    )
    weight = dsm_losses(own) if METHODS[name].residual_weight else None
    values = scores.scores(
        store, solved, row_weight=weight, max_memory=memory, device=corpus.device
    )
    values = values.reshape(len(DAMPINGS), len(pictures.cells), -1, store.num_rows)
    return np.repeat(values, len(CONCEPTS), 2) if values.shape[2] == 1 else values


def truth(corpus: Corpus, cells: list[Cell]) -> np.ndarray:
    """bool [cells, concepts, N]: training pictures that carry the concept."""
    return np.array(
        [[emoji.relevant(corpus.train, cell.words[c]) for c in CONCEPTS] for cell in cells]
    )


def summary(values: np.ndarray, relevant: np.ndarray) -> dict:
    """Recall@10, its 95 % interval over queries, mAP and least-10 recall; values, relevant
    [queries, N].
    """
    recall = metrics.recall_at_k(values, relevant)
    low, high = metrics.bootstrap_interval(recall)
    return {
        "recall_at_10": round(float(recall.mean()), 4),
        "ci95": [round(low, 4), round(high, 4)],
        "map": round(float(metrics.average_precision(values, relevant).mean()), 4),
        "least_10_recall": round(float(metrics.least_k_recall(values, relevant).mean()), 4),
    }


def choose_damping(values: np.ndarray, relevant: np.ndarray) -> int:
    """Index of the damping for a method, from cells that are asked about nowhere else; values [D,
    cells, concepts, N].

    The largest whose mean Recall@10 over cells and concepts is within one standard error of the
    best (Breiman et al. 1984): where the choice hardly matters, as it mostly does not, it neither
    ends at the edge of the sweep nor hangs on a few cells.
    """
    recall = np.array(
        [
            np.mean([metrics.recall_at_k(v[:, c], relevant[:, c]) for c in range(len(CONCEPTS))], 0)
            for v in values
        ]
    )
    best = recall[recall.mean(1).argmax()]
    error = best.std(ddof=1) / len(best) ** 0.5 if len(best) > 1 else 0.0
    return int(np.flatnonzero(recall.mean(1) >= best.mean() - error).max())


def chosen_methods(text: str) -> list[str]:
    """METHODS as names; empty is all. UserError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()] or list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"METHODS names {unknown[0]!r}; choose among {', '.join(METHODS)}")
    return names


def tables(corpus: Corpus, groups: dict[str, list[Cell]]) -> tuple[dict, dict[str, float]]:
    """{kind: {group: {concept: {method: summary}}}} and the dampings."""
    methods, cells, names = (
        chosen_methods(corpus.settings.methods),
        sum(groups.values(), []),
        list(groups),
    )
    pictures = Pictures(corpus, cells)
    bounds = np.cumsum([0, *(len(groups[n]) for n in names)])
    relevant, part = (
        truth(corpus, cells),
        {n: slice(bounds[i], bounds[i + 1]) for i, n in enumerate(names)},
    )
    out, dampings = (
        {kind: {g: {c: {} for c in CONCEPTS} for g in ("ood", "id")} for kind in KINDS},
        {},
    )
    for name in methods:
        for kind in KINDS:
            values = method_scores(corpus, name, kind, pictures)
            if name not in dampings:
                dampings[name] = choose_damping(values[:, part["tune"]], relevant[part["tune"]])
            for group in ("ood", "id"):
                for c, concept in enumerate(CONCEPTS):
                    v, truth_of = values[:, part[group], c], relevant[part[group], c]
                    entry = summary(v[dampings[name]], truth_of)
                    entry["oracle_recall_at_10"] = round(
                        max(float(metrics.recall_at_k(x, truth_of).mean()) for x in v), 4
                    )
                    out[kind][group][concept][name] = entry
    for kind in KINDS:
        for name, values in controls.control_scores(corpus, pictures, kind).items():
            for group in ("ood", "id"):
                for c, concept in enumerate(CONCEPTS):
                    out[kind][group][concept][name] = summary(
                        values[part[group], c], relevant[part[group], c]
                    )
        for group in ("ood", "id"):
            for c, concept in enumerate(CONCEPTS):
                counts = relevant[part[group], c].sum(1)
                chance = [metrics.chance_recall_at_k(relevant.shape[-1], int(n)) for n in counts]
                out[kind][group][concept]["chance"] = {
                    "recall_at_10": round(float(np.mean(chance)), 4)
                }
    return out, {name: DAMPINGS[i] for name, i in dampings.items()}


def markdown(result: dict) -> str:
    """The table of a result, one row a method; * marks controls, which are not attribution methods."""
    lines = []
    for kind in KINDS:
        lines += [
            f"\n**{kind} queries**",
            "",
            "| method | OOD object | OOD style | ID object | ID style |",
            "|---|---|---|---|---|",
        ]
        table = result[kind]
        for name in table["ood"]["object"]:
            row = [table[g][c][name] for g in ("ood", "id") for c in CONCEPTS]
            lines.append(f"| {name} | " + " | ".join(_entry(e) for e in row) + " |")
    return "\n".join(lines)


def _entry(e: dict) -> str:
    if "ci95" not in e:
        return f"{e['recall_at_10']:.3f}"
    oracle = f"; oracle {e['oracle_recall_at_10']:.2f}" if "oracle_recall_at_10" in e else ""
    return f"{e['recall_at_10']:.2f} [{e['ci95'][0]:.2f}, {e['ci95'][1]:.2f}] (least {e['least_10_recall']:.2f}, mAP {e['map']:.2f}{oracle})"


def evaluate(corpus: Corpus) -> dict:
    """Print the table and, as the last line, one JSON object; both are kept under the results
    folder.
    """
    groups = choose_cells(corpus)
    found, dampings = tables(corpus, groups)
    result = {
        **found["generated"],
        "damping": dampings.get("concept_trak"),
        "dampings": dampings,
        "real": found["real"],
        "queries": {name: len(cells) for name, cells in groups.items()},
    }
    folder = Path(corpus.settings.results_dir).parent / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(found)
    write_json(
        folder / "metrics.json",
        {**result, "settings": as_dict(corpus.settings), "provenance": provenance()},
    )
    (folder / "table.md").write_text(table + "\n")
    print(table)
    print(json.dumps(result))
    return result
