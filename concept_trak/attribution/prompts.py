"""Words of a question: targets, their negative prompts, folder names."""

from __future__ import annotations

import hashlib
import re
import shlex

from ..errors import UserError
from ..parsing import nearest

QUERY_FORMS = ("slider", "cfg", "concept")


def split_list(text: str) -> list[str]:
    """Items of a list separated by "|" or, when there is none, by ","; blanks around items do not
    count.
    """
    return [item.strip() for item in text.split("|" if "|" in text else ",")]


def find_target(prompt: str, target: str) -> re.Match:
    """Where the target stands in the prompt, as whole words, whatever the case. UserError if it
    does not, or if either is empty.
    """
    if not prompt.strip():
        raise UserError(
            "PROMPT is empty; set what to generate, e.g. PROMPT='a cat in the style of blob'"
        )
    if not target.strip():
        raise UserError(
            "TARGET_CONCEPTS holds an empty concept; set TARGET_CONCEPTS to words of "
            "PROMPT, separated by ',' or '|'"
        )
    match = _search(prompt, target)
    if match is None:
        words, length = prompt.split(), len(target.split())
        runs = [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
        near = nearest(target.strip(), dict.fromkeys(runs), 1)
        meant = f"did you mean TARGET_CONCEPTS={shlex.quote(near[0])}? " if near else ""
        raise UserError(
            f"target concept {target!r} is not in the prompt {prompt!r}; {meant}TARGET_CONCEPTS "
            "must name words of PROMPT"
        )
    return match


def is_in(text: str, target: str) -> bool:
    """Whether the target stands in a text as `find_target` finds it; blanks may be any."""
    return _search(" ".join(text.split()), " ".join(target.split())) is not None


def _search(text: str, target: str) -> re.Match | None:
    return re.search(rf"(?<!\w){re.escape(target.strip())}(?!\w)", text, re.IGNORECASE)


def split_prompt(prompt: str, target: str) -> tuple[str, str]:
    """(the words that ask for the target, the prompt without them): the target with its article or
    the "in the style of" before it.

    >>> split_prompt("an elephant in the style of blob", "elephant")
    ('an elephant', 'in the style of blob')
    """
    match = find_target(prompt, target)
    before, after = prompt[: match.start()], prompt[match.end() :]
    before = re.sub(r"(?:\b(?:a|an|the)\s+)$", "", before, flags=re.IGNORECASE)
    before = re.sub(
        r"(?:,|\b(?:in the style of|painted by|by|with|and|of|on)\b)\s*$",
        "",
        before.rstrip(),
        flags=re.IGNORECASE,
    )
    rest = re.sub(r"\s+(?=[\s,])", "", f"{before.rstrip()} {after.strip()}").strip(" ,")
    rest = re.sub(r"^(?:and|with|by|of|on)\s+", "", rest, flags=re.IGNORECASE)
    words = re.sub(
        r"^(?:and|with|by|of|on)\s+",
        "",
        prompt[len(before) : match.end()].strip(" ,"),
        flags=re.IGNORECASE,
    )
    return words, rest


def negative_of(prompt: str, target: str) -> str:
    """The prompt without the target, its article, and the "in the style of" or joining word that
    led up to it.

    >>> negative_of("an elephant in the style of blob", "elephant")
    'in the style of blob'
    """
    return split_prompt(prompt, target)[1]


def negatives(prompt: str, targets: list[str], given: str) -> list[str]:
    """One negative prompt for each target: those given, else derived from *this* prompt. UserError
    when the numbers differ.
    """
    derived = [negative_of(prompt, target) for target in targets]
    if not given:
        return derived
    items = (
        split_list(given) if len(targets) > 1 else [given.strip()]
    )  # the only negative may hold commas
    if len(items) != len(targets):
        raise UserError(
            f"NEGATIVE_PROMPTS has {len(items)} items for {len(targets)} targets; give "
            "NEGATIVE_PROMPTS one each, separated by '|'"
        )
    return items


def contrasts(form: str, prompt: str, targets: list[str], given: str = "") -> list[tuple[str, str]]:
    """(c+, c-) of each target. Negative prompts that are `given` replace c- in every form.

    slider    the prompt against the prompt without the target (Concept-TRAK)
    cfg       the prompt against the empty prompt
    concept   the target's own words against the empty prompt: no other word of the prompt
              takes part in the gradient
    """
    if form not in QUERY_FORMS:
        raise UserError(
            f"QUERY_FORM={form!r} is unknown; set QUERY_FORM to one of {', '.join(QUERY_FORMS)}"
        )
    minus = negatives(prompt, targets, given)
    if form != "slider" and not given:
        minus = [""] * len(targets)
    plus = [split_prompt(prompt, target)[0] if form == "concept" else prompt for target in targets]
    return list(zip(plus, minus, strict=True))


def slug(text: str, length: int) -> str:
    """Lower-case words joined by "-", at most `length` characters."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "empty"


def target_slug(target: str) -> str:
    """{slug32}, as in the reference, with a hash where words were cut or letters lost, so that two
    targets never share a folder.
    """
    short = slug(target, 32)
    whole = re.sub(r"\s+", "-", target.strip().lower()) == short
    return short if whole else f"{short}-{hashlib.sha1(target.encode()).hexdigest()[:6]}"


def query_slug(prompt: str) -> str:
    """{slug48}-{sha1[:10]} of the prompt, as in the reference."""
    return f"{slug(prompt, 48)}-{hashlib.sha1(prompt.encode()).hexdigest()[:10]}"
