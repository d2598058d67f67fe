"""What the page says about one concept: a column, with a panel for each damping."""

from __future__ import annotations

from dataclasses import dataclass

from ..scoring.concept import ConceptResult
from .formats import damping_power, format_score, power_of_ten, score_unit
from .histogram import Histogram, histogram
from .shown import Shown


@dataclass(frozen=True)
class Card:
    """One training image in a ranking; `match` is None where truth is not known."""

    index: int
    score: str
    caption: str
    match: bool | None


@dataclass(frozen=True)
class Panel:
    """What the damping switch changes in a column.

    power:      the damping in units of 0.1 x mean eigenvalue
    unit:       the power of ten that scores are told in, "" for plain scores
    top, least: cards from the highest (lowest) score on
    quality:    see `ConceptResult.quality`
    """

    power: str
    unit: str
    top: list[Card]
    least: list[Card]
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


def _panel(concept: ConceptResult, d: int, shown: Shown, quality: dict[str, float] | None) -> Panel:
    scores, relevant = concept.scores[d], concept.relevant if concept.has_truth else None
    unit, captions = score_unit(scores), shown.dataset.captions

    def cards(largest: bool) -> list[Card]:
        return [
            Card(
                index=index,
                score=format_score(float(scores[index]), unit),
                caption=captions[index],
                match=None if relevant is None else bool(relevant[index]),
            )
            for index in concept.ranked(d, shown.top_k, largest)
        ]

    return Panel(
        power=damping_power(concept.dampings[d]),
        unit=power_of_ten(unit) if unit else "",
        top=cards(largest=True),
        least=cards(largest=False),
        histogram=histogram(scores, relevant, unit),
        quality=quality,
    )


def column(concept: ConceptResult, shown: Shown) -> Column:
    """The content of one concept's column, one panel a damping of the sweep."""
    quality = concept.quality() or [None] * len(concept.dampings)
    panels = [_panel(concept, d, shown, quality[d]) for d in range(len(concept.dampings))]
    return Column(concept, panels, concept.chance(), concept.oracle_index())
