"""The table of the small AbC: recall of the exemplars among the train pictures.

Protocols: "published", exemplars captioned with their train prompt, which holds <new1>; "blind",
exemplars under the empty caption, so that only the picture can find them; "crowd", blind, with the
exemplars of all other tokens, equally uncaptioned, among the pictures that are ranked. A method
that finds what has no caption, rather than what was asked, fails the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...attribution.corpus import Corpus
from ...attribution.question import Picture
from ...attribution.rankers import GradientRanker
from ...datasets.words import overlap
from ...registry import OBJECTIVES
from ...scoring import metrics
from ...scoring.ranking import ranking
from ...settings import DAMPINGS, JUDGE, TOKEN
from ..controls import distances
from ..evaluate import choose_damping
from .methods import METHODS
from .rows import drawn, exemplar_rows, folder_of, learned, query_row, question_of
from .tasks import Task, Token

PROTOCOLS = ("published", "blind", "crowd")
Scores = dict[str, np.ndarray]  # protocol -> [D, Q, N + E]; exemplars last, those of crowd are all


class Asked:
    """Tokens, tasks and pictures; places of the tasks of each split."""

    def __init__(self, corpus: Corpus, tokens: list[Token], tasks: list[Task], work: Path) -> None:
        self.corpus, self.tokens, self.tasks, self.work = corpus, tokens, tasks, work
        self.pictures: list[Picture] = []
        for token in self.asked():
            learned(corpus, token, work)
            self.pictures += drawn(corpus, [t for t in tasks if t.token is token], work)

    def asked(self) -> list[Token]:
        """The tokens that are asked about, in the order of the tasks."""
        return [token for token in self.tokens if any(t.token is token for t in self.tasks)]

    def split(self, name: str) -> np.ndarray:
        """Places of the tasks of a split."""
        return np.flatnonzero([task.token.split == name for task in self.tasks])

    def relevant(self, protocol: str) -> np.ndarray:
        """bool [Q, N + E]."""
        count, rows = len(self.corpus.train), []
        for task in self.tasks:
            if protocol == "crowd":
                own = [np.full(len(t.pictures), t is task.token) for t in self.tokens]
            else:
                own = [np.ones(len(task.token.pictures), bool)]
            rows.append(np.concatenate([np.zeros(count, bool), *own]))
        return np.stack(rows)


def scores_of(asked: Asked, name: str) -> Scores:
    """One method by gradients, at every damping."""
    method, ranker = METHODS[name], METHODS[name].ranker(asked.corpus)
    weighted = method.weighted and OBJECTIVES.get(ranker.corpus.settings.f).row_weight is not None
    store = ranker._train
    folder = folder_of(ranker.corpus, store) / ("concept" if ranker.per_concept else "whole")
    queries, captioned = [], {}
    for token in asked.asked():
        learned(ranker.corpus, token, asked.work)
        captioned[token.name] = exemplar_rows(ranker.corpus, token, token.train_prompt, folder)
        for task, picture in zip(asked.tasks, asked.pictures, strict=True):
            if task.token is token:
                question = question_of(ranker.corpus, task, picture)
                queries.append(query_row(ranker, question, folder))
    blind = {t.name: exemplar_rows(ranker.corpus, t, "", folder) for t in asked.tokens}
    solved = ranker.corpus.preconditioner.solve(store, np.concatenate(queries), DAMPINGS)
    train = np.concatenate([b.double().numpy() for _, b in store.tensor_blocks(256, "cpu")])
    weight = ranker.row_weight() if weighted else None
    of_train = solved @ train.T * (1 if weight is None else weight)
    everyone = _exemplar_scores(ranker, solved, np.concatenate(list(blind.values())), weighted)
    found: dict[str, list[np.ndarray]] = {protocol: [] for protocol in PROTOCOLS}
    for q, task in enumerate(asked.tasks):
        of = {"published": captioned[task.token.name], "blind": blind[task.token.name]}
        for protocol, rows in of.items():
            own = _exemplar_scores(ranker, solved[:, q : q + 1], rows, weighted)
            found[protocol].append(np.concatenate([of_train[:, q : q + 1], own], 2))
        found["crowd"].append(np.concatenate([of_train[:, q : q + 1], everyone[:, q : q + 1]], 2))
    return {protocol: np.concatenate(parts, 1) for protocol, parts in found.items()}


def _exemplar_scores(
    ranker: GradientRanker, solved: np.ndarray, rows: np.ndarray, weighted: bool
) -> np.ndarray:
    """[D, Q, E] of rows [E, k + 1], the last column what a weight is made from."""
    values = solved @ rows[:, :-1].astype(np.float64).T
    if not weighted:
        return values
    weight = OBJECTIVES.get(ranker.corpus.settings.f).row_weight
    return values * weight(rows[:, -1].astype(np.float64), ranker._train.losses())


def controls_of(asked: Asked) -> dict[str, Scores]:
    """What pixels, latents, the judge and text alone find; pictures look the same in every
    protocol.
    """
    corpus, found = asked.corpus, {}
    looks = {
        "pixel_neighbours": _pixels,
        "latent_neighbours": lambda corpus, shown: _flat(corpus.model.encode_images(shown).numpy()),
    }
    if (JUDGE / "judge.json").is_file():
        looks["judge_features"] = _judged
    size = corpus.model.image_size
    queries = np.stack([p.pixels for p in asked.pictures if p.pixels is not None])
    pictures = np.concatenate([_small(t.pictures, size) for t in asked.tokens])
    shown = np.concatenate([corpus.train.images(range(len(corpus.train)), size=size), pictures])
    for name, look in looks.items():
        found[name] = _protocols(asked, -distances(look(corpus, queries), look(corpus, shown)))
    word = TOKEN.strip("<>")
    text = overlap(word, corpus.train.captions)
    ones = {"published": 1.0, "blind": 0.0, "crowd": 0.0}
    found["caption_similarity"] = {
        protocol: np.stack(
            [np.r_[text, np.full(r.shape[0] - len(text), ones[protocol])] for r in relevant]
        )[None]
        for protocol, relevant in ((p, asked.relevant(p)) for p in PROTOCOLS)
    }
    return found


def _protocols(asked: Asked, values: np.ndarray) -> Scores:
    """Of values [Q, N + all exemplars]."""
    count, starts, at = len(asked.corpus.train), {}, len(asked.corpus.train)
    for token in asked.tokens:
        starts[token.name] = at
        at += len(token.pictures)
    own = []
    for row, task in zip(values, asked.tasks, strict=True):
        first = starts[task.token.name]
        own.append(np.r_[row[:count], row[first : first + len(task.token.pictures)]])
    alone = np.stack(own)[None]
    return {"published": alone, "blind": alone, "crowd": values[None]}


def _small(pictures: np.ndarray, size: int) -> np.ndarray:
    sides, lanczos = (size, size), Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(p).resize(sides, lanczos)) for p in pictures])


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float32)


def _pixels(corpus: Corpus, shown: np.ndarray) -> np.ndarray:
    return _flat(shown)


def _judged(corpus: Corpus, shown: np.ndarray) -> np.ndarray:
    from ...workshop.judge.net import resized
    from ...workshop.judge.saved import load_judge

    judge = load_judge(JUDGE)
    return judge.features(resized(shown, judge.settings.size))


def figures(asked: Asked, found: Scores) -> dict[str, dict[str, Any]]:
    """{protocol: figures} over the reported tasks; the damping is chosen on the tune tasks of that
    protocol by `choose_damping`.
    """
    told, tune, report = {}, asked.split("tune"), asked.split("report")
    for protocol, values in found.items():
        relevant = asked.relevant(protocol)
        d = choose_damping(values[:, tune, None], relevant[tune][:, None])
        at, right = values[d, report], relevant[report]
        recall = metrics.recall_at_k(at, right)
        low, high = metrics.bootstrap_interval(recall)
        told[protocol] = {
            "recall_at_10": round(float(recall.mean()), 4),
            "ci95": [round(low, 4), round(high, 4)],
            "reverse_recall_at_10": round(float(metrics.least_k_recall(at, right).mean()), 4),
            "map": round(float(metrics.average_precision(at, right).mean()), 4),
            "hubs": round(hubs(at), 4),
            "recall_curve": metrics.recall_curve(at, right).round(3).tolist(),
            "damping": DAMPINGS[d] if len(values) > 1 else None,
            "per_query": [round(float(r), 4) for r in recall],
        }
    return told


def hubs(values: np.ndarray, k: int = 10) -> float:
    """Share of the top k of all rankings [Q, N] that the k pictures which are most often there
    take: 1 when every question has the same answer, whatever was asked.
    """
    _, often = np.unique(ranking(values)[:, :k], return_counts=True)
    return float(np.sort(often)[-k:].sum() / (len(values) * k))


def steps(told: dict[str, dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each step of the ablation adds to Recall@10 (published), with its interval over
    queries, paired.
    """
    values = [np.array(told[name]["published"]["per_query"]) for name in names]
    found = []
    for before, after in zip(values, values[1:], strict=False):
        low, high = metrics.bootstrap_interval(after - before)
        change = float((after - before).mean())
        found.append({"change": round(change, 4), "ci95": [round(low, 4), round(high, 4)]})
    return found


def chance(asked: Asked) -> dict[str, float]:
    """Expected Recall@10 of a random order."""
    return {
        protocol: round(
            float(
                np.mean(
                    [
                        metrics.chance_recall_at_k(len(r), int(r.sum()))
                        for r in asked.relevant(protocol)
                    ]
                )
            ),
            4,
        )
        for protocol in PROTOCOLS
    }


def markdown(told: dict[str, dict[str, Any]], at_random: dict[str, float]) -> str:
    """One row a method: Recall@10 [95 %] (reverse recall, mAP, `hubs`) in each protocol."""
    lines = [f"| method | {' | '.join(PROTOCOLS)} |", "|---" * (1 + len(PROTOCOLS)) + "|"]
    for name, entries in told.items():
        row = []
        for e in (entries[protocol] for protocol in PROTOCOLS):
            low, high = e["ci95"]
            rest = f"reverse {e['reverse_recall_at_10']:.2f}, mAP {e['map']:.2f}"
            rest += f", hubs {e['hubs']:.2f}"
            row.append(f"{e['recall_at_10']:.3f} [{low:.2f}, {high:.2f}] ({rest})")
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines.append(f"| chance | {' | '.join(f'{at_random[p]:.3f}' for p in PROTOCOLS)} |")
    return "\n".join(lines)


def levels_markdown(levels: dict[str, dict[int, float]]) -> str:
    """A row a step of the ablation: `rows.level_shares`, from the lowest noise level up."""
    lines = ["| train rows | share of the squared norm, by noise level |", "|---|---|"]
    for name, shares in levels.items():
        told = ", ".join(f"{level}: {share:.4f}" for level, share in sorted(shares.items()))
        lines.append(f"| {name} | {told} |")
    return "\n".join(lines)
