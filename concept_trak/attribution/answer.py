"""The main job: which training images taught the model each target concept of a prompt?

`answer` computes and writes nothing but the query rows it is told to keep; `report.answer` makes
folders and a page of what it returns. A page, a service or a notebook asks here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..datasets import emoji
from ..datasets.folder import ImageCaptionDataset
from ..errors import UserError
from ..registry import OBJECTIVES
from ..rows.fit import caption_llr, relative_fit
from ..scoring.concept import ConceptResult
from ..settings import DAMPINGS, as_dict, digest, provenance
from ..store.shards import Store
from . import prompts
from .corpus import Corpus
from .plan import folder_name
from .question import Picture, Question, generated
from .rankers import GradientRanker
from .train_grad import open_store


@dataclass(frozen=True)
class Answer:
    """Scores of all training images for every concept asked about, at every damping.

    picture: the query. questions, concepts: one a target, in the order asked. dataset: of the N
    scored images. settings, provenance: JSON that made it. unseen: True if the prompt is a held-out
    caption, False if a training one, None if neither. warnings: what a reader must know, one
    sentence each. fit: [N], how well each caption fits its picture (`rows.fit.relative_fit`), where
    the objective asks that.
    """

    picture: Picture
    questions: list[Question]
    concepts: list[ConceptResult]
    dataset: ImageCaptionDataset
    settings: dict[str, Any]
    provenance: dict[str, Any]
    unseen: bool | None
    warnings: list[str] = field(default_factory=list)
    fit: np.ndarray | None = None


def answer(
    corpus: Corpus, keep: Callable[[GradientRanker, list[Question]], np.ndarray] | None = None
) -> Answer:
    """Answer PROMPT and TARGET_CONCEPTS. keep: see `GradientRanker`.

    UserError for words that do not fit, before anything is computed.
    """
    s = corpus.settings
    targets = prompts.split_list(s.target_concepts)
    contrasts = prompts.contrasts(s.query_form, s.prompt, targets, s.negative_prompts)
    emoji.refuse_unknown(corpus.everything, s.prompt, targets)
    warnings = _cut(corpus, targets, [text for pair in contrasts for text in pair])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    store = open_store(corpus)
    (picture,) = generated(corpus.model, s, [s.prompt], s.seed)
    asked = zip(targets, contrasts, strict=True)
    questions = [Question(picture, target, plus, minus) for target, (plus, minus) in asked]
    for question in questions:
        print(f"{question.words!r}: {question.plus!r} against {question.minus!r}")
    values = GradientRanker(corpus, store, keep=keep).rank(questions)
    concepts = [
        ConceptResult(q.words, q.minus, values[:, i], DAMPINGS, emoji.truth(corpus.train, q.words))
        for i, q in enumerate(questions)
    ]
    recorded = as_dict(s) | {
        "store": folder_name(s),
        "store_checksum": store.checksum,
        "settings_hash": digest(as_dict(s)),
    }
    made, seen = provenance(), _unseen(corpus, s.prompt)
    told, fit = (picture, questions, concepts, corpus.train), caption_fits(corpus, store)
    return Answer(*told, recorded, made, seen, warnings, fit)


def caption_fits(corpus: Corpus, store: Store) -> np.ndarray | None:
    """[N] `rows.fit.relative_fit` of the train pictures; None where the store's rows are of an
    objective that does not ask it.
    """
    if OBJECTIVES.get(corpus.settings.f).beside is not caption_llr:
        return None
    beside = store.losses()
    return relative_fit(beside, beside)


def _cut(corpus: Corpus, targets: list[str], contrasts: list[str]) -> list[str]:
    """What the text encoder does not read of the prompts, in a sentence each.

    contrasts: c+ and c- of each target in turn. UserError for a target that is cut off.
    """
    s, model = corpus.settings, corpus.model
    limit = f"the model reads {model.pipe.tokenizer.model_max_length - 2} tokens of a prompt"
    for target, plus in zip(targets, contrasts[::2], strict=True):
        for text in (s.prompt, plus):
            lost, words = model.lost_words(text), text.split()
            kept = words[: len(words) - len(lost.split())]
            if not prompts.is_in(" ".join(kept), target):
                raise UserError(
                    f"the target concept {target!r} is cut off: {limit}, and {lost!r} does not "
                    "fit; shorten PROMPT or move the concept to its front"
                )
    lost = {text: model.lost_words(text) for text in (s.prompt, *contrasts, s.negative_prompt)}
    return [f"{words!r} of {text!r} is not read: {limit}" for text, words in lost.items() if words]


def _unseen(corpus: Corpus, prompt: str) -> bool | None:
    if prompt in corpus.train.captions:
        return False
    return True if prompt in corpus.everything.captions else None
