"""The main job: which training images taught the model each target concept of a prompt?

`answer` computes and writes nothing but the query rows it is told to keep; `report.write` makes
folders and a page of what it returns. A page, a service or a notebook asks here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..datasets import labels
from ..datasets.image_folder import ImageCaptionDataset
from ..errors import UserError
from ..gradients.caption_fit import caption_llr, low_fit_warning, relative_fit
from ..parsing import normalized, parse_methods
from ..process import log
from ..registry import OBJECTIVES, RANKERS
from ..scoring.memory import refuse_scores
from ..scoring.result import ConceptResult
from ..settings import DAMPINGS, as_dict, provenance, short_hash
from ..store.store import Store
from . import prompts
from .attributors import GradientAttributor
from .index_search import search_index
from .naming import store_name
from .preflight import check_targets
from .question import Query, QueryImage, generate
from .task import AttributionTask
from .train_grad import open_store

DEFAULT_METHOD = "concept_trak"  # the method of the settings themselves, which every answer has


@dataclass(frozen=True)
class AttributionResult:
    """Scores of all training images for every concept asked about, at every damping.

    picture: the query. questions, concepts: one a target, in the order asked. dataset: of the N
    scored images. settings, provenance: JSON that made it. unseen: True if the prompt is a held-out
    caption, False if a training one, None if neither. warnings: what a reader must know, one
    sentence each. fit: [N], how well each caption fits its picture
    (`gradients.caption_fit.relative_fit`), where
    the objective asks that. others: {method: [D, Q, N], or [1, Q, N] of one that knows no damping},
    those of METHODS beside ours.
    """

    picture: QueryImage
    questions: list[Query]
    concepts: Sequence[ConceptResult]
    dataset: ImageCaptionDataset
    settings: dict[str, Any]
    provenance: dict[str, Any]
    unseen: bool | None
    warnings: list[str] = field(default_factory=list)
    fit: np.ndarray | None = None
    others: dict[str, np.ndarray] = field(default_factory=dict)


def answer(
    task: AttributionTask,
    keep: Callable[[GradientAttributor, list[Query]], np.ndarray] | None = None,
    draw: Callable[[AttributionTask], QueryImage] | None = None,
    store: Store | None = None,
) -> AttributionResult:
    """Answer PROMPT and TARGET_CONCEPTS. keep: see `GradientAttributor`. draw: the picture, which
    may
    be known from before; default: drawn. store: of the train rows, where `open_store` has checked
    it before.

    UserError for words that do not fit, before anything is computed.
    """
    s = task.settings
    targets, contrasts, warnings = resolve_targets(task)
    _warn(warnings)
    store = store or open_store(task, verify=s.search == "scan")
    s = task.settings  # now those of the rows
    memory = task.preconditioner.budget.max_memory  # too little for it is told by now
    if s.search == "scan":
        refuse_scores(len(DAMPINGS) * len(targets), store.num_rows, memory)
    fit = caption_fits(task, store)
    doubts = [] if fit is None else low_fit_warning(fit)
    _warn(doubts)
    picture = (draw or generate_query_image)(task)
    asked = zip(targets, contrasts, strict=True)
    questions = [Query(picture, target, plus, minus) for target, (plus, minus) in asked]
    for question in questions:
        log(f"{question.words!r}: {question.plus!r} against {question.minus!r}")
    concepts = _results(GradientAttributor(task, store, keep=keep), store, questions)
    recorded = as_dict(s) | {
        "store": store_name(s),
        "store_checksum": store.checksum,
        "settings_hash": short_hash(as_dict(s)),
    }
    made, seen = provenance(), _unseen(task, s.prompt)
    told = picture, questions, concepts, task.train
    return AttributionResult(
        *told, recorded, made, seen, warnings + doubts, fit, _others(task, questions)
    )


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr)


def _results(
    ranker: GradientAttributor, store: Store, questions: list[Query]
) -> Sequence[ConceptResult]:
    """Of each question, by a scan or by an index."""
    if ranker.task.settings.search == "index":
        return search_index(ranker, store, questions)
    values, train = ranker.rank(questions), ranker.task.train
    return [
        ConceptResult(
            q.words, q.minus, values[:, i], DAMPINGS, labels.relevance_or_none(train, q.words)
        )
        for i, q in enumerate(questions)
    ]


def resolve_targets(task: AttributionTask) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """(targets, (c+, c-) of each, what a reader must know of them, a sentence each) of PROMPT and
    TARGET_CONCEPTS. UserError for words that do not fit.
    """
    targets, contrasts = check_targets(task.settings, task.everything)
    warnings = _truncation_warnings(task, targets, [text for pair in contrasts for text in pair])
    warnings += held_against_itself(targets, contrasts)
    return targets, contrasts, warnings + _tokenizer_warnings(task, targets)


def held_against_itself(targets: list[str], contrasts: list[tuple[str, str]]) -> list[str]:
    """A sentence for each target that the negative prompt given for it asks for, too."""
    return [
        f"NEGATIVE_PROMPTS gives {minus!r} for {target!r} and asks for it, too: what the prompt "
        "is held against is not the prompt without it"
        for target, (_, minus) in zip(targets, contrasts, strict=True)
        if prompts.contains(minus, target)
    ]


def _others(task: AttributionTask, questions: list[Query]) -> dict[str, np.ndarray]:
    """Scores by the other methods of METHODS; makes their train rows where there are none yet."""
    found = {}
    for name in parse_methods(task.settings.methods):
        if name != DEFAULT_METHOD:
            log(f"ranking by {name} ...")
            values = RANKERS.get(name)(task).rank(questions)
            if len(values) not in (1, len(DAMPINGS)):  # a sweep of its own, e.g. of steps
                middle = len(values) // 2
                log(f"{name} has {len(values)} settings of its own; the middle one is taken")
                values = values[middle : middle + 1]
            found[name] = values
    return found


def generate_query_image(task: AttributionTask, known: torch.Tensor | None = None) -> QueryImage:
    """The picture of PROMPT. known: its latents [1, C, h, w], if they were kept."""
    s = task.settings
    (picture,) = generate(task.model, s, [s.prompt], s.seed, known)
    return picture


def caption_fits(task: AttributionTask, store: Store) -> np.ndarray | None:
    """[N] `gradients.caption_fit.relative_fit` of the train pictures; None where the store's rows
    are of an objective that does not ask it.
    """
    if OBJECTIVES.get(task.settings.f).beside is not caption_llr:
        return None
    beside = store.losses()
    return relative_fit(beside, beside)


def _truncation_warnings(
    task: AttributionTask, targets: list[str], contrasts: list[str]
) -> list[str]:
    """What the text encoder does not read of the prompts, in a sentence each.

    contrasts: c+ and c- of each target in turn. UserError for a target that is cut off.
    """
    s, model = task.settings, task.model
    limit = f"the model reads {model.pipe.tokenizer.model_max_length - 2} tokens of a prompt"
    for target, plus in zip(targets, contrasts[::2], strict=True):
        for text in (s.prompt, plus):
            lost, words = model.lost_words(text), text.split()
            kept = words[: len(words) - len(lost.split())]
            if not prompts.contains(" ".join(kept), target):
                raise UserError(
                    f"the target concept {target!r} is cut off: {limit}, and {lost!r} does not "
                    "fit; shorten PROMPT or move the concept to its front"
                )
    lost = {text: model.lost_words(text) for text in (s.prompt, *contrasts, s.negative_prompt)}
    return [f"{words!r} of {text!r} is not read: {limit}" for text, words in lost.items() if words]


def _tokenizer_warnings(task: AttributionTask, targets: list[str]) -> list[str]:
    """A sentence for each target that no caption holds and whose words the tokenizer spells instead
    of reading them: the model hardly knows it. Labelled data refuse such words.
    """
    if labels.has_labels(task.everything):
        return []
    tokenizer, told = task.model.pipe.tokenizer, []
    for target in targets:
        if any(prompts.contains(caption, target) for caption in task.train.captions):
            continue
        pieces = {word: tokenizer.tokenize(word) for word in target.split()}
        if spelt := [w for w, p in pieces.items() if len(p) > 2 or tokenizer.unk_token in p]:
            letters = " ".join(pieces[spelt[0]]).replace("</w>", "")
            told.append(
                f"no caption holds {target!r}, and the model hardly knows {spelt[0]!r} (its "
                f"tokenizer spells it {letters}): the scores may mean nothing"
            )
    return told


def _unseen(task: AttributionTask, prompt: str) -> bool | None:
    if prompt in map(normalized, task.train.captions):
        return False
    return True if prompt in map(normalized, task.everything.captions) else None
