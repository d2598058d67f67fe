"""`concept-trak tables`: the figures of every benchmark's committed table.json side by side, with
chance, what text alone finds, and what the paper reports; experiments/README.md quotes it.

Nothing is computed here: a table that is not there yet is said to be missing, with the command that
makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from concept_trak.errors import git_restore_hint
from concept_trak.flags import place
from concept_trak.settings import ROOT
from concept_trak.validated_io import read_json

# Concept-TRAK (Park et al. 2026) as published: Recall@10, which its synthetic table defines as the
# share of the top ten.
# `reference` is the recipe as published, so the paper's own figure stands beside it, too.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "synthetic": {
        "id": {"concept_trak": 1.00, "das": 1.00, "d_trak": 1.00, "trak": 0.80},
        "ood": {"concept_trak": 0.85, "das": 0.50, "d_trak": 0.50, "trak": 0.45},
    },
    "faces": {
        "id": {"concept_trak": 0.92, "das": 0.96, "d_trak": 0.50, "trak": 0.84},
        "ood": {"concept_trak": 0.97, "das": 0.67, "d_trak": 0.30, "trak": 0.60},
    },
}
PAPER_ABLATION = (0.04, 0.261, 0.335, 0.564, 0.955)
FIGURES = ("ua", "ira", "cra")  # of UnlearnCanvas, see `cad`
STEPS = ("TRAK", "+ concept query", "+ DPS train gradient", "+ DDIM inversion", "+ unit norm")


def add_parser(verbs: Any) -> None:
    """The sub-command `tables`."""
    says = "Print the figures of every committed table beside chance, text alone and the paper."
    sub = verbs.add_parser("tables", help=says, description=says)
    sub.add_argument(
        "--experiments",
        type=place,
        metavar="FOLDER",
        default=str(ROOT / "experiments"),
        help="their folder (default: experiments)",
    )
    sub.set_defaults(run=lambda arguments: print(overview(Path(arguments.experiments))))


def overview(folder: Path) -> str:
    """All tables as markdown. UserError for a table.json that cannot be read."""
    parts = [
        of_splits(folder / "synthetic/table.json", "scripts/synthetic/run_all.sh"),
        of_splits(folder / "faces/table.json", "scripts/faces/run_all.sh"),
        of_abc(folder / "emoji/abc_table.json"),
        of_ablation(folder / "emoji/abc_table.json", "ablation"),
        of_ablation(folder / "emoji/abc_table_reference.json", "ablation, recipe reference"),
        of_emoji(folder / "emoji/table.json"),
        of_weights(folder / "cad/table.json"),
    ]
    return "\n\n".join(parts)


def of_splits(path: Path, script: str) -> str:
    """Synthetic and faces: {"id", "ood": {method: value}, "control": value}."""
    name = path.parent.name
    if not path.is_file():
        return f"**{name}**: no table.json yet; `bash {script}` makes it"
    told = read_json(path, git_restore_hint(path))
    paper = {s: v | {"reference": v["concept_trak"]} for s, v in PAPER[name].items()}
    rows = [
        [method, _cell(told["id"], method), _cell(paper["id"], method)]
        + [_cell(told["ood"], method), _cell(paper["ood"], method)]
        for method in dict.fromkeys([*told["id"], *told["ood"]])
    ]
    control = told.get("control")
    if isinstance(control, int | float):
        rows.append(["label match (text-only control)", f"{control:.2f}", "-", "-", "-"])
    return table(name, ["method", "ID", "paper", "OOD", "paper"], rows)


def of_abc(path: Path) -> str:
    """AbC in small: {"published", "blind", "crowd": {method: value}}."""
    if not path.is_file():
        return "**AbC in small**: no abc_table.json yet; `bash scripts/emoji/run_abc.sh` makes it"
    told = read_json(path, git_restore_hint(path))
    names = [name for name in ("published", "blind", "crowd") if name in told]
    rows = [
        [method, *(_cell(told[protocol], method) for protocol in names)]
        for method in told["published"]
    ]
    return table("AbC in small", ["method", *names], rows)


def of_ablation(path: Path, heading: str) -> str:
    """Each step of the paper's ablation, with what it adds."""
    told = read_json(path, git_restore_hint(path)) if path.is_file() else {}
    if "ablation" not in told:
        return f"**{heading}**: not in {path.name} yet"
    changes = ["", *(_change(step) for step in told.get("steps", []))]
    rows = [
        [step, f"{value:.3f}", change, f"{paper:.3f}"]
        for step, value, change, paper in zip(
            STEPS, told["ablation"], changes, PAPER_ABLATION, strict=True
        )
    ]
    return table(heading, ["step", "Recall@10", "change [95 %]", "paper"], rows)


def of_emoji(path: Path) -> str:
    """The emoji benchmark, generated queries, held-out pairs."""
    if not path.is_file():
        return "**emoji**: no table.json yet; `bash scripts/emoji/run_eval.sh` makes it"
    told = read_json(path, git_restore_hint(path))["ood"]
    rows = [
        [method, *(f"{told[c][method]['recall_at_10']:.2f}" for c in ("object", "style"))]
        for method in told["object"]
    ]
    return table("emoji, held-out pairs", ["method", "object", "style"], rows)


def of_weights(path: Path) -> str:
    """Component attribution: mean UA, IRA and CRA of the best plan and of the published rule."""
    if not path.is_file():
        return "**weights**: no table.json yet; `bash scripts/cad/run_eval.sh` makes it"
    told = read_json(path, git_restore_hint(path))
    rows = [
        [f"{names}, {which}", *(f"{sum(f[n] for f in of) / len(of):.2f}" for n in FIGURES)]
        for kind, names in (("object", "objects"), ("style", "styles"))
        for which, of in (
            ("best plan", [*told[names].values()]),
            ("published rule", [*told["paper"][kind].values()]),
        )
    ]
    return table("weights", ["erased", *(name.upper() for name in FIGURES)], rows)


def _cell(values: dict[str, float], method: str) -> str:
    return f"{values[method]:.2f}" if method in values else "-"


def _change(step: dict[str, Any]) -> str:
    low, high = step["ci95"]
    return f"{step['change']:+.3f} [{low:+.2f}, {high:+.2f}]"


def table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
