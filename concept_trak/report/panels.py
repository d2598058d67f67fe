"""The parts of the page that depend on scores: one column a concept, and the comparison with other
rankings.

Functions that show pictures append the training indices they refer to to `shown`, so that the page
embeds exactly those.
"""

from __future__ import annotations

import math
from html import escape

from ..scoring.concept import METRIC_K, ConceptResult, lambda_label
from .histogram import format_score, histogram_svg, power_of_ten, score_unit


def damping_power(damping: float) -> str:
    """A damping in units of 0.1 x mean eigenvalue: 10⁻⁴, or 3.0e-04 when it is no power of ten."""
    label = lambda_label(damping)
    mantissa, exponent = label.split("e")
    return power_of_ten(int(exponent)) if mantissa == "1.0" else label


def _rate(value: float) -> str:
    """A rate with two decimals, more where they would read 0.00."""
    decimals = 2 if value == 0 or value >= 0.005 else min(6, -math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"


def _card(concept: ConceptResult, index: int, rank: int, caption: str, score: str) -> str:
    """Picture, rank, truth in words (never colour alone), score, caption."""
    truth, hit = "", False
    if concept.has_truth:
        hit = bool(concept.relevant[index])
        truth = '<span class="yes">✓ match</span>' if hit else '<span class="no">✗ no match</span>'
    caption = escape(caption)
    return (
        f'<li{" class=is-hit" if hit else ""}><svg class="pic" role="img" '
        f'aria-label="{caption}"><use href="#i{index}"/></svg>'
        f'<p class="meta"><span>{rank}</span>{truth}</p><p class="score">{score}</p><p '
        f'class="caption">{caption}</p></li>'
    )


def _cards(
    concept: ConceptResult,
    d: int,
    k: int,
    largest: bool,
    dataset,
    shown: list[int],
    switched: bool = True,
) -> str:
    """The k cards of one end at one damping; `switched` cards are a panel of the damping switch."""
    indices = concept.ranked(d, k, largest)
    shown += indices
    unit = score_unit(concept.scores[d])
    suffix = f" ×{power_of_ten(unit)}" if unit else ""
    cards = [
        _card(
            concept,
            index,
            rank,
            dataset.captions[index],
            format_score(float(concept.scores[d, index]), unit) + suffix,
        )
        for rank, index in enumerate(indices, start=1)
    ]
    panel = f" p p{d}" if switched else ""
    return f'<ol class="cards{panel}">{"".join(cards)}</ol>'


def _stats(concept: ConceptResult, d: int, quality: dict[str, float]) -> str:
    chance = {name: f"chance {_rate(value)}" for name, value in concept.chance().items()}
    names = {
        "recall_at_10": f"Recall@{METRIC_K}",
        "average_precision": "average precision",
        "least_10_recall": f"recall in the least {METRIC_K}",
    }
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{_rate(quality[name])}</dd><dd "
        f'class="note">{chance[name]}</dd></div>'
        for name, label in names.items()
    )
    return f'<dl class="stats p p{d}">{cells}</dl>'


def _plot(concept: ConceptResult, d: int) -> str:
    unit = score_unit(concept.scores[d])
    relevant = concept.relevant if concept.has_truth else None
    label = escape(
        f"Histogram of the scores of {concept.num_images} training images for {concept.target}"
    )
    key = f"<span><i></i>all {concept.num_images:,} training images</span>"
    if relevant is not None:
        key += f'<span><i class="tone"></i>the {int(relevant.sum()):,} that carry “{escape(concept.target)}”</span>'
    key += f"<span>scores in units of {power_of_ten(unit)}</span>" if unit else ""
    svg = histogram_svg(concept.scores[d], relevant, unit, label)
    return f'<div class="plot p p{d}">{svg}<p class="key">{key}</p></div>'


def _sweep_table(concept: ConceptResult, quality: list[dict[str, float]], fixed: int) -> str:
    """All dampings at once, the fixed and the oracle one named."""
    oracle, rows = concept.oracle_index(), []
    for d, damping in enumerate(concept.dampings):
        name = " ".join((["fixed"] if d == fixed else []) + (["oracle"] if d == oracle else []))
        cells = "".join(f"<td>{_rate(value)}</td>" for value in quality[d].values())
        chosen = ' class="chosen"' if d == fixed else ""
        rows.append(
            f'<tr{chosen}><th scope="row">{damping_power(damping)}</th>{cells}<td>{name}</td></tr>'
        )
    chance = "".join(f"<td>{_rate(value)}</td>" for value in concept.chance().values())
    rows.append(f'<tr><th scope="row">chance</th>{chance}<td></td></tr>')
    heads = ["λ", f"Recall@{METRIC_K}", "average precision", f"least {METRIC_K}", ""]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<details><summary>Every damping in numbers</summary>{table}</details>"


def concept_section(
    place: int, concept: ConceptResult, dataset, top_k: int, fixed: int, shown: list[int]
) -> str:
    """One concept's column: metrics, top cards, histogram, least cards in a fold-out, table of all
    dampings.
    """
    sweep, quality, target = range(len(concept.dampings)), concept.quality(), escape(concept.target)
    top = "".join(_cards(concept, d, top_k, True, dataset, shown) for d in sweep)
    least = "".join(_cards(concept, d, top_k, False, dataset, shown) for d in sweep)
    count = min(top_k, concept.num_images)
    negative = (
        f"“{escape(concept.negative_prompt)}”" if concept.negative_prompt else "the empty prompt"
    )
    stats = "".join(_stats(concept, d, quality[d]) for d in sweep) if quality else ""
    return (
        f'<section class="concept c{place % 5}"><h2>“{target}”</h2><p class="against">contrasted '
        f"with {negative}</p>{stats}"
        f"<h3>These taught it “{target}” <span>the {count} highest scores</span></h3>{top}"
        f"<h3>All scores</h3>{''.join(_plot(concept, d) for d in sweep)}"
        f"<details><summary>The {count} lowest scores <span>where negative, removing the image "
        "would strengthen the concept"
        f"</span></summary>{least}</details>"
        f"{_sweep_table(concept, quality, fixed) if quality else ''}</section>"
    )


def controls_section(
    concepts: list[ConceptResult],
    controls: dict[str, list[ConceptResult]],
    dataset,
    top_k: int,
    fixed_damping: float,
    shown: list[int],
) -> str:
    """Other rankings of the same images for the same concepts, each with its own top cards; empty
    without controls.
    """
    blocks = []
    for name, results in controls.items():
        columns = []
        for place, (concept, result) in enumerate(zip(concepts, results)):
            d = result.damping_index(fixed_damping) if len(result.dampings) > 1 else 0
            quality = result.quality()
            note = f"Recall@{METRIC_K} {_rate(quality[d]['recall_at_10'])}" if quality else ""
            cards = _cards(result, d, top_k, True, dataset, shown, switched=False)
            heading = f"<h3>{escape(name)} for “{escape(concept.target)}” <span>{note}</span></h3>"
            columns.append(f'<div class="c{place % 5}">{heading}{cards}</div>')
        blocks.append(f'<div class="halves">{"".join(columns)}</div>')
    if not blocks:
        return ""
    return f'<details class="below"><summary>What other rankings find</summary>{"".join(blocks)}</details>'
