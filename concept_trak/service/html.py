"""The pages for a browser, in the look of the report: no script, no request to another host."""

from __future__ import annotations

import functools
import re
import shlex
import types
import typing
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote

from jinja2 import ChoiceLoader, Environment, PackageLoader
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..attribution import prompts
from ..attribution.preflight import check_targets
from ..datasets import labels as emoji
from ..datasets.image_folder import ImageCaptionDataset
from ..datasets.list_concepts import labelled_questions
from ..errors import UserError
from ..report import page
from .job_queue import JobQueue

FORM_FIELDS = 40  # of a form, at most
BACK = """
<p class="eyebrow" style="margin-bottom: 28px"><a href="/">Ask another</a> ·
<a href="/answers/{name}">as JSON</a> · <a href="/answers/index.html">all answers</a></p>"""


@functools.cache
def environment() -> Environment:
    """The templates of this room and of the report; what they are given is escaped."""
    own = PackageLoader(__package__)
    report = page.environment()
    return report.overlay(loader=ChoiceLoader([own, report.loader]))


class Links:
    """The addresses of training pictures in place of the paths that a report's file names."""

    def __init__(self, data: ImageCaptionDataset) -> None:
        self.rows = {str(data.path(i).resolve()): i for i in range(len(data))}

    def address(self, folder: Path, link: str) -> str | None:
        """Of a link of a page in `folder`; None for one that leads to no training picture."""
        row = self.rows.get(str((folder / unquote(link)).resolve()))
        return None if row is None else f"/pictures/{row}"


def moved(html: str, folder: Path, links: Links) -> str:
    """A report's page, its links to pictures leading to this service, with a line back."""

    def changed(match: re.Match[str]) -> str:
        found = links.address(folder, match[1])
        return f'href="{found}"' if found else match[0]

    html = re.sub(r'href="(?!#|data:|https?:)([^"<>]+)"', changed, html)
    back = BACK.format(name=quote(folder.name))
    return html.replace("<main>", f"<main>{back}", 1)


def render(name: str, **about: Any) -> str:
    """A template of this room."""
    return environment().get_template(f"{name}.html.jinja").render(**about)


def waiting_page(status: dict[str, Any]) -> str:
    """The page of an answer that is on its way; it looks again by itself."""
    return render("waiting", **status)


def error_page(status: int, sentence: str) -> str:
    """The page of an error."""
    return render("refusal", status=status, sentence=sentence)


def form(queue: JobQueue, given: dict[str, str], refused: str) -> str:
    """The form, filled with what was `given`; refused: why it was not taken, or ""."""
    data, first = queue.task.train, example_of(queue)
    labels = {c: list(emoji.values(data, c)) for c in emoji.COLUMNS} if first else {}
    example = (first[0], "|".join(first[1])) if first else ("", "")
    return render(
        "form",
        given=defaultdict(str, given),
        opened=bool(given.keys() - {"prompt", "concepts"}),
        refused=refused,
        example=example,
        labels=labels,
        num_images=len(data),
        model=queue.task.settings.sd_model_path.rpartition("/")[2] or "the model",
        fields=inputs(queue.question, queue),
    )


def example_of(queue: JobQueue) -> tuple[str, list[str]] | None:
    """(prompt, its concepts) that the data know: those of the settings, else the first that the
    labels name. None for data without labels.
    """
    s, data = queue.task.settings, queue.task.everything
    if not emoji.has_labels(data):
        return None
    try:
        check_targets(s, data)
    except UserError:
        return next(labelled_questions(data), None)
    return s.prompt, prompts.split_list(s.target_concepts)


def inputs(question: type[BaseModel], queue: JobQueue) -> list[dict[str, Any]]:
    """The settings of a question as inputs of the form."""
    words = ("prompt", "concepts", "negative_prompts", "thumbnails")
    return [
        {
            "name": name,
            "choices": choices_of(field),
            "usual": getattr(queue.task.settings, name),
            "says": (field.description or "").partition("; left out:")[0],
        }
        for name, field in question.model_fields.items()
        if name not in words
    ]


def kind_of(field: FieldInfo) -> Any:
    """The type of a field that may be left out."""
    parts = [t for t in typing.get_args(field.annotation) if t is not types.NoneType]
    return parts[0] if parts else field.annotation


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The allowed values of a field, () for any."""
    kind = kind_of(field)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def fields_of(body: bytes) -> dict[str, str]:
    """What a form sends (application/x-www-form-urlencoded), empty fields left out; nothing of what
    is no text.
    """
    try:
        found = parse_qs(body.decode("ascii"), max_num_fields=FORM_FIELDS, errors="strict")
    except ValueError:
        return {}
    return {name: values[0] for name, values in found.items() if values[0].strip()}


def question_of(given: dict[str, str], question: type[BaseModel]) -> dict[str, Any]:
    """The values of a form as those of a request. UserError for a number that is none."""
    values: dict[str, Any] = {}
    for name, text in given.items():
        field = question.model_fields.get(name)
        kind = None if field is None else kind_of(field)
        if name in ("concepts", "negative_prompts"):
            values[name] = prompts.split_list(text)
        elif kind in (int, float):
            try:
                values[name] = kind(text)
            except ValueError:
                raise UserError(f"{name}: {text[:40]!r} is no number; give {name} one") from None
        else:
            values[name] = text
    return values


def docs(schema: dict[str, Any], address: str, example: str) -> str:
    """How the service is asked, from its OpenAPI description.

    address, example: where to and what, in a line for curl.
    """
    calls = [
        {"path": path, "method": method.upper(), "parameters": [], "requestBody": None, **about}
        for path, methods in schema["paths"].items()
        for method, about in methods.items()
    ]
    question = schema["components"]["schemas"]["Question"]
    fields = [
        {
            "name": name,
            "needed": name in question["required"],
            "limits": _limits(about),
            "says": about.get("description", ""),
        }
        for name, about in question["properties"].items()
    ]
    line = f"curl -s {address} -H 'Content-Type: application/json' \\\n  -d {shlex.quote(example)}"
    return render("docs", line=line, info=schema["info"], calls=calls, fields=fields)


def _limits(about: dict[str, Any]) -> str:
    """The type of a value, and what bounds it."""
    parts = [p for p in about.get("anyOf", [about]) if p.get("type") != "null"]
    kind = parts[0]
    told = [kind["type"]] if "enum" not in kind else [" | ".join(kind["enum"])]
    bounds = {"minimum": "from", "maximum": "to", "maxLength": "letters at most"}
    bounds |= {"minItems": "items at least", "maxItems": "items at most"}
    told += [
        f"{kind[key]} {word}" if "at" in word else f"{word} {kind[key]}"
        for key, word in bounds.items()
        if key in kind
    ]
    return ", ".join(told)
