"""The table of a bench: precision@10 of every ranker, by split and scope.

A figure is the mean over models (networks x seeds), combinations, attributes and drawings; the
interval is over models and combinations, whose drawings belong together. Each ranker has one
damping for all models and scopes, chosen on drawings of other noises by the rule of
`experiments.benchmark.evaluate`: the largest within one standard error of the best. What the best
damping of the table itself would give is named oracle; a ranker with a step to choose has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from concept_trak.atomic_io import write_bytes, write_json
from concept_trak.registry import RANKERS
from concept_trak.scoring.metrics import bootstrap_interval
from concept_trak.settings import DAMPINGS, as_dict, provenance
from experiments.benchmark.evaluate import is_baseline
from experiments.benchmark.plots import png
from experiments.overview import PAPER
from experiments.truth import lds
from experiments.truth.setup import format_interval

from . import figures as plots
from .pipeline import AttributeBenchmark, TrainedModel
from .queries import SPLITS
from .score_cache import ByModel, MethodScores, attribute, damping_of, steps_of

OURS, CONTROL = ("concept_trak", "reference"), "caption_similarity"
# whose figures of the paper (`overview.PAPER`) stand beside a bench's; its Concept-TRAK is our
# recipe reference
PUBLISHED = {"synthetic": "synthetic", "celeba_hq": "faces"}


def table_of(bench: AttributeBenchmark) -> dict[str, Any]:
    """Print the table, keep it with its plots and all details below the bench's folder, and return
    what is committed as table.json.
    """
    found = attribute(bench)
    chosen = {name: damping_of(models) for name, models in found["local"].items()}
    told = summarised(found, chosen)
    result = {
        split: {n: f[split]["precision"] for n, f in told["local"].items() if split in f}
        for split in reversed(SPLITS)
    }
    result |= {
        "control": told["local"].get(CONTROL, {}).get("ood", {}).get("precision"),
        "margin_ood": margin(found["local"], chosen),
        "classified": bench.classify(),
    }
    networks = {
        network: summarised({s: of_network(r, network) for s, r in found.items()}, chosen)
        for network in dict.fromkeys(model.network for model in bench.models)
    }
    models = [model.name for model in bench.models]
    detail = {"scopes": told, "networks": networks, "models": models}
    parts = [markdown_of(bench.own.bench, told)]
    if len(networks) > 1:
        each = networks.items()
        parts += [f"\n**{name}**\n\n{markdown_of(bench.own.bench, own)}" for name, own in each]
    markdown = "\n".join(parts)
    print(markdown)
    made = {"settings": as_dict(bench.settings), "bench": vars(bench.own)}
    folder = bench.own.folder / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", result | detail | made | {"provenance": provenance()})
    write_bytes(folder / "table.md", f"{markdown}\n".encode())
    figure = plots.precision_against_k(curves(found, told, chosen))
    write_bytes(folder / "precision.png", png(figure))
    return result


def of_network(rankers: Mapping[str, dict[TrainedModel, MethodScores]], network: str) -> Any:
    """The models of one network."""
    return {
        name: {model: found for model, found in models.items() if model.network == network}
        for name, models in rankers.items()
    }


def summarised(found: ByModel, chosen: Mapping[str, int]) -> dict[str, dict[str, dict[str, Any]]]:
    """{scope: {ranker: {split: figures, "damping", "seconds"}}}; chosen: {ranker: place of its
    damping or step}.
    """
    told: dict[str, dict[str, dict[str, Any]]] = {scope: {} for scope in found}
    for scope, rankers in found.items():
        for name, models in rankers.items():
            d = chosen[name]
            entry: dict[str, Any] = {s: figures(models, s, d) for s in SPLITS if has(models, s)}
            sweep, steps = len(next(iter(models.values())).top), steps_of(name)
            entry["damping"] = DAMPINGS[d] if sweep == len(DAMPINGS) else None
            if steps:  # reported questions were asked at no other
                entry |= {s: {**entry[s], "oracle": None} for s in SPLITS if s in entry}
                entry["step"] = steps[d]
            seconds = [one.seconds / max(1, len(one.split)) for one in models.values()]
            entry["models"] = len(models)
            entry["seconds"] = round(float(np.mean(seconds)), 4)
            told[scope][name] = entry
    return told


def has(models: Mapping[TrainedModel, MethodScores], split: str) -> bool:
    """Whether a split was asked about."""
    return any((one.split == split).any() for one in models.values())


def figures(models: Mapping[TrainedModel, MethodScores], split: str, d: int) -> dict[str, Any]:
    """Precision@10 at a damping, its interval, by attribute, oracle, least ten, chance."""
    groups = np.concatenate([one.groups(split) for one in models.values()], 1)
    low, high = bootstrap_interval(groups[d])
    first = next(iter(models.values()))
    concepts = {
        c: _rounded(
            np.concatenate([one.groups(split, concept=c)[d] for one in models.values()]).mean()
        )
        for c in dict.fromkeys(first.concept.tolist())
    }
    at = [one.split == split for one in models.values()]
    pairs = list(zip(models.values(), at, strict=True))
    return {
        "precision": _rounded(groups[d].mean()),
        "ci95": [_rounded(low), _rounded(high)],
        "by_attribute": concepts,
        "oracle": _rounded(groups.mean(1).max()),
        "least_10": _rounded(np.concatenate([one.least[d, a] for one, a in pairs]).mean()),
        "chance": _rounded(np.concatenate([one.chance[a] for one, a in pairs]).mean()),
    }


def margin(
    rankers: Mapping[str, dict[TrainedModel, MethodScores]], chosen: Mapping[str, int]
) -> dict[str, Any]:
    """{ours: precision above the best rival on "ood", with an interval over pairs}. Rivals are all
    that ask about a whole picture and are no control.
    """
    there = {n: rankers[n] for n in rankers if is_rival(n) and has(rankers[n], "ood")}
    told: dict[str, Any] = {}
    for name in OURS:
        if there and name in rankers:
            own = rankers[name]
            values = {n: _at_damping(of, chosen[n], own) for n, of in there.items()}
            best = max(values, key=lambda n: values[n].mean())
            difference = _at_damping(own, chosen[name], own) - values[best]
            low, high = bootstrap_interval(difference)
            told[name] = {
                "over": best,
                "margin": _rounded(difference.mean()),
                "ci95": [_rounded(low), _rounded(high)],
            }
    return told


def is_rival(name: str) -> bool:
    """Whether a ranker is of another kind than ours and knows the model."""
    per_concept = getattr(RANKERS.get(name), "per_concept", False)
    return name not in OURS and not is_baseline(name) and not per_concept


def _at_damping(
    models: Mapping[TrainedModel, MethodScores], d: int, among: Mapping[TrainedModel, Any]
) -> np.ndarray:
    """Precision on "ood" of the combinations of those models that are `among` others."""
    return np.concatenate([models[m].groups("ood")[d] for m in among if m in models])


def curves(
    found: ByModel, told: Any, chosen: Mapping[str, int]
) -> dict[str, dict[str, np.ndarray]]:
    """{split: {label: precision at 1, 2, ...}}, chance among them."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for split in SPLITS:
        for scope, rankers in found.items():
            for name, models in rankers.items():
                if not has(models, split):
                    continue
                d = chosen[name]
                label = name if scope == "local" else f"{name}, {scope}"
                rows = [one.top[d][one.split == split] for one in models.values()]
                hits = np.concatenate(rows).cumsum(1) / np.arange(1, rows[0].shape[1] + 1)
                out.setdefault(split, {})[label] = hits.mean(0)
                chance = told["local"][name][split]["chance"]
                out[split]["chance"] = np.full(hits.shape[1], chance)
    return out


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def markdown_of(bench: str, told: Any) -> str:
    """A row a ranker and scope; the paper's figures where it has some."""
    paper = PAPER.get(PUBLISHED.get(bench, ""), {})
    heads = (
        "method",
        "scope",
        "models",
        "ID",
        "OOD",
        "OOD, oracle damping",
        "OOD, least ten",
        "paper ID",
    )
    heads = (*heads, "paper OOD", "seconds a question")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for scope, rankers in told.items():
        for name, e in rankers.items():
            theirs = {"reference": "concept_trak", "concept_trak": ""}.get(name, name)
            known = {k: v[theirs] for k, v in paper.items() if scope == "local" and theirs in v}
            whole = [_cell(e.get(split)) for split in reversed(SPLITS)]
            ood = e.get("ood", {})
            rest = [_number(ood.get(k)) for k in ("oracle", "least_10")]
            published = [f"{known[s]:.2f}" if s in known else "" for s in reversed(SPLITS)]
            row = [name, scope, str(e["models"]), *whole, *rest, *published, f"{e['seconds']:.3f}"]
            lines.append(f"| {' | '.join(row)} |")
    chances = [
        next((f"{e[s]['chance']:.2f}" for e in told["local"].values() if s in e), "")
        for s in reversed(SPLITS)
    ]
    lines.append(f"| chance |  |  | {' | '.join(chances)} |" + "  |" * (len(heads) - 5))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cell(e: Any) -> str:
    return format_interval(e["precision"], e["ci95"]) if e else ""


# ---- retraining


def truth_table(bench: AttributeBenchmark, test: str) -> dict[str, Any]:
    """The LDS or the counterfactual of a bench, printed, kept and drawn."""
    from experiments.truth.figures import drops

    from .retraining import RetrainingBenchmark

    truth = RetrainingBenchmark(bench)
    folder = bench.own.folder / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    if test == "lds":
        told = truth.lds_table()
        markdown, drawn = lds_markdown(told), plots.lds_bars(told, truth.seconds())
    else:
        told = truth.counterfactual_table()
        kinds = {k: v for k, v in told.items() if k not in ("noise", "targets")}
        markdown, drawn = counterfactual_markdown(kinds), drops(kinds, {}, "judge_drop")
    print(markdown)
    told = {"bench": bench.own.bench, "test": test, "network": truth.network, **told}
    made = {"settings": as_dict(bench.settings), "own": vars(bench.own)}
    write_json(folder / f"{test}.json", told | made | {"provenance": provenance()})
    write_bytes(folder / f"{test}.md", f"{markdown}\n".encode())
    write_bytes(folder / f"{test}.png", png(drawn))
    return told


def lds_markdown(told: Mapping[str, Any]) -> str:
    """A row a ranker: against presences, and against what is drawn."""
    heads = "presence: LDS | partial | squared | drawn: LDS | partial | squared"
    lines = [f"| method | {heads} |", "|---" * 7 + "|"]
    for name, e in told.items():
        if isinstance(e, dict) and "lds" in e:
            cells = [
                format_interval(part[f], part[lds.interval_of(f)])
                for part in (e, e["drawn"])
                for f in ("lds", "partial", "squared")
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if told["ceiling"] is not None:
        both = f"{told['ceiling']:.2f} |  |  | {told['ceiling_drawn']:.2f}"
        lines.append(f"| ceiling: another seed | {both} |  |  |")
    return "\n".join(lines)


def counterfactual_markdown(kinds: Mapping[str, Any]) -> str:
    """A table a kind, a row an arm."""
    wanted = ("judge_drop", "judge_share_of_oracle", "target_drop", "untouched_drop", "other_drop")
    lines = []
    for kind, arms in kinds.items():
        lines += [f"\n**{kind}**\n", f"| removed | pictures | seeds | {' | '.join(wanted)} |"]
        lines.append("|---" * (3 + len(wanted)) + "|")
        for arm, e in arms.items():
            cells = [format_interval(e[f], e[f"{f}_ci95"]) if f in e else "" for f in wanted]
            lines.append(f"| {arm} | {e['removed']} | {e['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)
