"""The table of `run_eval.sh` in words: what its line of JSON says, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .model_selection import FIGURES, GOALS

HEAD = "UA | IRA | CRA |"


def markdown(line: Mapping[str, Any]) -> str:
    """All tables of `table.json_summary`, each under a sentence that says what it is of."""
    told = [_tried(line)]
    told += [_kind(line, "object", "objects"), _kind(line, "style", "styles")]
    told += [_by_plan(line), _controls(line), _faithfulness(line), _amplified(line)]
    return "\n\n".join(told)


def _tried(line: Mapping[str, Any]) -> str:
    lines = ["Plans on the objects that choose (95 % intervals over objects):", ""]
    lines += [f"| plan | pictures | {HEAD}", "|---|---|---|---|---|"]
    for tried in line["tried"]:
        pictures = "{} + {}".format(*tried["pictures"])
        lines.append(f"| {_plan(tried['plan'])} | {pictures} | {_cells(tried)} |")
    return "\n".join([*lines, "", f"Chosen: {_plan(line['chosen']['best'])}."])


def _kind(line: Mapping[str, Any], kind: str, names: str) -> str:
    """Targets of a kind beside the published rule, and how many meet the goals."""
    found, published = line[names], line["paper"][kind]
    asked = ", ".join(f"{n.upper()} {g:g}" for n, g in zip(FIGURES, GOALS[kind], strict=True))
    said = f"{names.capitalize()}, {line['pictures'][0]} pictures of each (95 % over pictures)"
    lines = [f"{said}, beside the published rule:", ""]
    lines += [f"| {kind} | {HEAD} published rule |", "|---|---|---|---|---|"]
    for name, of in found.items():
        plan = f" ({_plan(of['plan'])})" if "plan" in of else ""
        theirs = " / ".join(f"{published[name][n]:.2f}" for n in FIGURES)
        lines.append(f"| {name}{plan} | {_cells(of)} | {theirs} |")
    for told, each in (("ours", found), ("published rule", published)):
        reach = [_reaching(each, n, g) for n, g in zip(FIGURES, GOALS[kind], strict=True)]
        together = sum(
            all(of[n] >= g for n, g in zip(FIGURES, GOALS[kind], strict=True))
            for of in each.values()
        )
        lines += ["", f"{told}: means {_means(each)}; {_listed(reach)} of {len(each)} reach "]
        lines[-1] += f"{asked}, {together} all three."
    return "\n".join(lines)


def _reaching(each: Mapping[str, Any], figure: str, goal: float) -> int:
    return sum(of[figure] >= goal for of in each.values())


def _listed(numbers: list[int]) -> str:
    return f"{numbers[0]}, {numbers[1]} and {numbers[2]}"


def _means(each: Mapping[str, Any]) -> str:
    return " / ".join(f"{sum(of[n] for of in each.values()) / len(each):.2f}" for n in FIGURES)


def _by_plan(line: Mapping[str, Any]) -> str:
    lines = ["Plans from which a style's is chosen by the others, means over styles:", ""]
    lines += ["| plan | UA / IRA / CRA |", "|---|---|"]
    lines += [
        f"| {_plan(plan.split(' '))} | {_means(each)} |"
        for plan, each in line["styles_by_plan"].items()
    ]
    return "\n".join(lines)


def _controls(line: Mapping[str, Any]) -> str:
    lines = ["As many weights of the same tensors, chosen otherwise:", ""]
    lines += [f"| weights | {HEAD} CAD is better by |", "|---|---|---|---|---|"]
    for name, of in line["controls"].items():
        low, high = of["cad_above_ci95"]
        above = "" if name == "cad" else f"{of['cad_above']:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {name} | {_cells(of)} | {above} |")
    return "\n".join(lines)


def _faithfulness(line: Mapping[str, Any]) -> str:
    lines = ["Pearson of predicted and true change under random masks:", ""]
    lines.append("| weights masked | masks | J | J, with curvature | J made anew | judge |")
    lines.append("|---|---|---|---|---|---|")
    for selection, of in line["faithfulness"].items():
        cells = [
            "" if of[n] is None else f"{of[n]:.2f}" for n in ("fixed", "second", "anew", "judge")
        ]
        cells[-1] += f" ({of['masks_judged']} masks)" if of["masks_judged"] else ""
        name = selection.replace("|", "\\|")
        lines.append(f"| {name} | {of['masks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _amplified(line: Mapping[str, Any]) -> str:
    weak, low, high = line["amplify_weak"], *line["amplify_gain_ci95"]
    said = [
        f"Amplified after erasing: the judge's rate rises by {line['amplify_gain']:.2f} "
        f"[{low:.2f}, {high:.2f}]; {line['amplify_kept']:.2f} of other objects kept.",
        f"Amplified as they are, the objects drawn worst: by {weak['gain']:.2f} "
        f"[{weak['gain_ci95'][0]:.2f}, {weak['gain_ci95'][1]:.2f}]; {weak['kept']:.2f} kept.",
    ]
    curve = ["Change of J_amplify when that share of the weights is removed:", ""]
    curve += [
        "| share | weights | by the scores | with curvature | true |",
        "|---|---|---|---|---|",
    ]
    for at in line["amplify_curve"]:
        changes = f"{at['predicted']:+.4f} | {at['second']:+.4f} | {at['true']:+.4f}"
        curve.append(f"| {at['ratio']:g} | {at['weights']:,} | {changes} |")
    return "\n\n".join([*said, "\n".join(curve)])


def _plan(plan: list[Any]) -> str:
    """Of a `tuning.Key`, what is not the usual left out."""
    selection, ratio, granularity, operator, spared, others = plan
    said = [selection.replace("|", "\\|"), str(ratio)]
    said += [word for word in (granularity, operator) if word not in ("scalar", "zero")]
    return ", ".join([*said, *([f"{others} spared x {spared}"] if others else [])])


def _cells(of: Mapping[str, Any]) -> str:
    return " | ".join(
        f"{of[n]:.2f} [{of[f'{n}_ci95'][0]:.2f}, {of[f'{n}_ci95'][1]:.2f}]" for n in FIGURES
    )
