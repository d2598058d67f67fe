"""What the page says about one concept: a column, with a panel for each damping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..datasets.caption_overlap import caption_overlap
from ..gradients.caption_fit import MIDDLE, describe_fit
from ..scoring.result import ConceptResult
from .context import ReportContext
from .formatting import damping_name, format_score, power_of_ten, score_unit
from .histogram import Histogram, histogram


@dataclass(frozen=True)
class ImageCard:
    """One training image in a ranking.

    link: to its file, "" where there is none. match: None where truth is not known. text_rank: its
    place when captions alone are compared with the concept's words, equal ones sharing the best.
    fit: in words, "" where it is not known. suspect: whether its caption does not fit.
    """

    index: int
    score: str
    caption: str
    match: bool | None
    text_rank: int
    fit: str
    suspect: bool
    link: str


@dataclass(frozen=True)
class Panel:
    """What the damping switch changes in a column.

    damping:    as DAMPING has it, in mean eigenvalues
    unit:       the power of ten that scores are told in, "" for plain scores
    top, least: cards from the highest (lowest) score on
    quality:    see `ConceptResult.quality`
    """

    damping: str
    unit: str
    top: list[ImageCard]
    least: list[ImageCard]
    histogram: Histogram
    quality: dict[str, float] | None


@dataclass(frozen=True)
class Column:
    """One concept; `chance` and `oracle` as in `ConceptResult`, None where truth is not known."""

    concept: ConceptResult
    panels: list[Panel]
    chance: dict[str, float] | None
    oracle: int | None

    @property
    def indices(self) -> list[int]:
        """The training images that the cards show, with repeats."""
        ends = [end for panel in self.panels for end in (panel.top, panel.least)]
        return [card.index for cards in ends for card in cards]


def text_ranks(concept: str, captions: list[str]) -> np.ndarray:
    """[N] ranks from 1 on by the share of the concept's words in a caption; ties share the best."""
    shares = -caption_overlap(concept, captions)
    # not rankdata: SciPy's statistics take half a second to load, of a page that takes one
    return np.searchsorted(np.sort(shares), shares) + 1


def _panel(
    concept: ConceptResult,
    d: int,
    shown: ReportContext,
    quality: dict[str, float] | None,
    by_text: np.ndarray,
) -> Panel:
    relevant = concept.relevant if concept.has_truth else None
    unit, captions, fit = score_unit(concept.scores[d]), shown.dataset.captions, shown.fit
    images, spread = concept.spread(d)

    def cards(largest: bool) -> list[ImageCard]:
        ranked = concept.ranked(d, shown.top_k, largest)
        return [
            ImageCard(
                index=index,
                score=format_score(float(score), unit),
                caption=captions[index],
                match=None if relevant is None else bool(relevant[index]),
                text_rank=int(by_text[index]),
                fit="" if fit is None else describe_fit(float(fit[index])),
                suspect=fit is not None and bool(fit[index] < MIDDLE),
                link=shown.links.pictures(index) if shown.links else "",
            )
            for index, score in zip(ranked, concept.scores_of(d, ranked), strict=True)
        ]

    return Panel(
        damping=damping_name(concept.dampings[d]),
        unit=power_of_ten(unit) if unit else "",
        top=cards(largest=True),
        least=cards(largest=False),
        histogram=histogram(spread, None if relevant is None else relevant[images], unit),
        quality=quality,
    )


def column(concept: ConceptResult, shown: ReportContext) -> Column:
    """The content of one concept's column, one panel a damping of the sweep."""
    quality = concept.quality() or [None] * len(concept.dampings)
    by_text = text_ranks(concept.target, shown.dataset.captions)
    panels = [_panel(concept, d, shown, quality[d], by_text) for d in range(len(concept.dampings))]
    return Column(concept, panels, concept.chance(), concept.oracle_index())
