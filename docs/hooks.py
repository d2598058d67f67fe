"""Pages of the site that are made when it is built: the first from README.md, one on the verbs from
their parsers, one a package from its docstrings. A new verb or module appears by itself.
"""

import ast
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    pages = {"index.md": first_page(), "verbs.md": verbs(), **layers()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def first_page() -> str:
    """README.md, whose links are given from the repository."""

    def moved(match: re.Match) -> str:
        path = match[1]
        return f"]({path[5:]})" if path.startswith("docs/") else f"](../{path})"

    return re.sub(r"\]\((?!http|#)([^)]+)\)", moved, (ROOT / "README.md").read_text("utf-8"))


def verbs() -> str:
    """Every sub-command with its help."""
    from concept_trak import cli

    top, parts = cli.parser(), ["# Verbs\n"]
    (found,) = top._subparsers._group_actions
    for name, parser in found.choices.items():
        parser.complete().with_defaults("emoji")
        parts.append(f"## {name}\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def layers() -> dict[str, str]:
    """{path: page} of the packages, each module under its docstring."""
    from concept_trak import LAYERS

    return {f"api/{layer}.md": layer_page(layer) for layer in LAYERS}


def layer_page(layer: str) -> str:
    """The modules of a package that hold a docstring."""
    folder, parts = ROOT / "concept_trak" / layer, [f"# {layer}\n"]
    for path in sorted(folder.rglob("*.py")):
        if ast.get_docstring(ast.parse(path.read_text("utf-8"))):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            parts.append(f"::: {dotted.removesuffix('.__init__')}\n")
    return "\n".join(parts)
