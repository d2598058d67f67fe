"""What every ranker found, kept: relevance of its highest pictures, for every damping.

A file a model, scope and ranker, named by the hash of all that decides it; a killed run goes on
with the next.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ...attribution.corpus import Corpus
from ...attribution.plan import row_settings
from ...attribution.question import Question
from ...files import make_folder, write_bytes
from ...registry import RANKERS
from ...scoring.ranking import ranking
from ...settings import as_dict, digest
from ..rankers import swept
from .questions import LabelledBenchmark
from .settings import SCOPES
from .stages import Bench, Model

DEEPEST = 100  # ranks kept: what precision is shown at
LEAST = 10


@dataclass(frozen=True)
class Found:
    """One ranker on one model. top: bool [D, Q, K], relevance by rank, K at most `DEEPEST`; least:
    [D, Q], share of relevant ones in the lowest ten; chance [Q]. split, concept, group [Q]: the
    last is the number of a question's combination. D: dampings, or candidates for a step. seconds:
    of all questions together at one step, rows of the train pictures not counted.
    """

    top: np.ndarray
    least: np.ndarray
    chance: np.ndarray
    split: np.ndarray
    concept: np.ndarray
    group: np.ndarray
    seconds: float

    def at(self, k: int) -> np.ndarray:
        """Precision at k [D, Q]."""
        return self.top[..., :k].mean(-1)


def scopes_of(ranker: str) -> tuple[str, ...]:
    """A concept can be asked of a picture or as such; whole-picture rankers know one scope."""
    per_concept = getattr(RANKERS.get(ranker), "per_concept", False)
    return SCOPES if per_concept else SCOPES[:1]


def attribute(bench: Bench) -> Iterator[tuple[Model, str, str, Found]]:
    """(model, scope, ranker, what it found), computed where it is not kept."""
    for model in bench.models:
        corpus = bench.corpus(model)
        benchmark = bench.benchmark(corpus)
        for name in tqdm(bench.rankers_of(model), desc=f"attributing {model.name}"):
            for scope in scopes_of(name):
                own = corpus.with_settings(corpus.settings.but(scope=scope))
                yield model, scope, name, kept(bench, own, benchmark, name)


def kept(bench: Bench, corpus: Corpus, benchmark: LabelledBenchmark, name: str) -> Found:
    """What one ranker found, from its file or computed."""
    path = bench.own.folder / "scores" / f"{name}-{identity(corpus, benchmark, name)}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            parts = {k: file[k] for k in file.files}
        return Found(**{**parts, "seconds": float(parts["seconds"])})
    found = compute(corpus, benchmark, name)
    content = io.BytesIO()
    np.savez_compressed(content, **vars(found))
    make_folder(path.parent)
    write_bytes(path, content.getvalue())
    return found


def identity(corpus: Corpus, benchmark: LabelledBenchmark, name: str) -> str:
    """Of all that decides what a ranker finds."""
    s, asked = corpus.settings, benchmark.asked
    places = ("sd_model_path", "data_dir", "grad_dir", "results_dir", "methods", "batch_size")
    kept = {k: v for k, v in as_dict(s).items() if k not in places}
    questions = [asked.combinations, asked.samples, asked.tune, asked.classifier is not None]
    model = [corpus.model.identity(), corpus.data.content_hash(), row_settings(s)]
    return digest([name, kept, questions, model, DEEPEST, *steps_of(name)])


def steps_of(name: str) -> tuple[float, ...]:
    """Among which a ranker's is chosen; none where it has dampings, or nothing to choose."""
    return getattr(RANKERS.get(name), "candidates", ())


def compute(corpus: Corpus, benchmark: LabelledBenchmark, name: str) -> Found:
    """Rank, and keep what the table needs. Scope global asks each concept of a combination once:
    it does not see the picture.
    """
    splits = benchmark.questions()
    asked = [q for questions in splits.values() for q in questions]
    ranker, begun = RANKERS.get(name)(corpus), time.perf_counter()
    once: dict[tuple[str, str, str], int] = {}
    places = list(range(len(asked)))
    if corpus.settings.scope == "global":
        keys = [(q.picture.prompt, q.plus, q.minus) for q in asked]
        places = [once.setdefault(key, i) for i, key in enumerate(keys)]
    chosen = sorted(set(places))
    values = swept(ranker, [asked[i] for i in chosen])
    seconds = (time.perf_counter() - begun) / max(1, len(steps_of(name)))
    values = values[:, np.searchsorted(chosen, places)]
    names = [split for split, questions in splits.items() for _ in questions]
    return found_of(values, asked, names, benchmark, seconds)


def found_of(
    values: np.ndarray,
    asked: list[Question],
    splits: list[str],
    benchmark: LabelledBenchmark,
    seconds: float,
) -> Found:
    """From scores [D, Q, N]."""
    relevant = np.stack([benchmark.relevant(q) for q in asked])
    deep = min(DEEPEST, values.shape[-1])
    top, least = [], []
    for scores in values:
        highest, lowest = ranking(scores)[:, :deep], ranking(scores, largest=False)[:, :LEAST]
        top.append(np.take_along_axis(relevant, highest, 1))
        least.append(np.take_along_axis(relevant, lowest, 1).mean(1))
    concept = np.array([q.concept for q in asked])
    chance = relevant.mean(1)
    _, group = np.unique([q.picture.prompt for q in asked], return_inverse=True)
    split, parts = np.array(splits), (np.stack(top), np.stack(least))
    return Found(*parts, chance, split, concept, group, seconds)
