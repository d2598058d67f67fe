"""Words of a question: targets, their negative prompts, folder names."""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence

from ..errors import UserError
from ..parsing import nearest, normalized

QUERY_FORMS = ("slider", "cfg", "concept")
# Thai, Lao, Burmese, Khmer, Chinese and Japanese are written without blanks between words
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u3005-\u3007\u3041-\u30ff"
    "\u31f0-\u31ff\u3400-\u9fff\ua9e0-\ua9fe\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
STACKING = "\u1039\u17d2"  # Burmese and Khmer: the next letter stands below this one
HYPHENS = "-\u2010\u2011"
PAIRS = ("''", '""', "()", "[]", "{}", "\u2018\u2019", "\u201c\u201d", "\u00ab\u00bb")
PLURALS = (("y", "ies"), ("man", "men"), ("f", "ves"), ("fe", "ves"), ("", "es"), ("", "s"))
LETTERS = 2  # of a word, beside its plural's ending
HALF_BEFORE, HALF_AFTER = re.compile(rf"\w[{HYPHENS}]$"), re.compile(rf"[{HYPHENS}]\w")
IN_A = re.compile(r"\bin\s+(?:(?:an?|the)\s+)?$", re.IGNORECASE)
STYLE = re.compile(r"\s+style(?=\s*(?:$|[,.;]))", re.IGNORECASE)
JOINING = r"^(?:and|with|by|of|on)\s+"


def split_list(text: str) -> list[str]:
    """Items of a list separated by "|" or, when there is none, by ","; blanks around items do not
    count.
    """
    return [item.strip() for item in text.split("|" if "|" in text else ",")]


def find_target(prompt: str, target: str) -> re.Match:
    """Where the target first stands in the prompt, in NFC, as whole words, whatever the case and
    the blanks. UserError if it does not, or if either is empty.
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
    match = _search(normalized(prompt), target)
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


def contains(text: str, target: str) -> bool:
    """Whether the target stands in a text as `find_target` finds it."""
    return _search(normalized(text), target) is not None


def _search(text: str, target: str) -> re.Match | None:
    pattern, start = _pattern(target), 0
    while match := pattern.search(text, start):
        if all(_may_end(text, place) for place in match.span()):
            return match
        start = match.start() + 1
    return None


@functools.lru_cache
def _pattern(target: str) -> re.Pattern:
    """The target with any blanks, either apostrophe and either spelling of a sharp s."""
    text = r"\s+".join(map(re.escape, normalized(target).split()))
    text = re.sub("ss|ß|ẞ", "(?:ss|ß)", text, flags=re.IGNORECASE)
    return re.compile(re.sub("['’]", "['’]", text), re.IGNORECASE)


def _may_end(text: str, place: int) -> bool:
    """Whether a word may end, and another begin, before text[place]: not between a letter and its
    signs, nor between two letters, unless one is of a script without blanks.
    """
    if place in (0, len(text)):
        return True
    before, after = text[place - 1], text[place]
    if _is_sign(after) or before in STACKING:
        return False
    apart = not all(c.isalnum() or c == "_" or _is_sign(c) for c in (before, after))
    return apart or UNSPACED.search(before + after) is not None


def _is_sign(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def asking_words(prompt: str, target: str) -> str:
    """The words of the prompt that ask for the target: itself, with its article or the "in the
    style of" before it.

    >>> asking_words("an elephant in the style of blob", "elephant")
    'an elephant'
    """
    match = find_target(prompt, target)
    before = match.string[: _with_marks(match)[0]]
    words = f"{before[len(_led_up_to(before)) :]}{match[0]}".strip(" ,")
    return re.sub(JOINING, "", words, flags=re.IGNORECASE)


def without_target(prompt: str, target: str) -> str:
    """The prompt without the target wherever it stands, its article, and the "in the style of" or
    joining word that led up to it.

    UserError where that cannot be told: the target is half of a word with a hyphen, or another
    number of it is left.

    >>> without_target("an elephant in the style of blob", "elephant")
    'in the style of blob'
    >>> without_target("a cat and a black cat", "cat")
    'a black'
    """
    match, rest = find_target(prompt, target), ""
    while match:
        rest = _without(match)
        match = _search(rest, target)
    if left := next(
        (form for form in _forms(normalized(target).strip()) if contains(rest, form)), ""
    ):
        raise UserError(
            f"without {target!r} the prompt {prompt!r} still holds {left!r}; set NEGATIVE_PROMPTS "
            "to PROMPT without all that asks for it"
        )
    return rest


def _without(match: re.Match) -> str:
    """The text without the target at this place, and without what led up to it."""
    start, end = _with_marks(match)
    before, after = match.string[:start], match.string[end:]
    if HALF_BEFORE.search(before) or HALF_AFTER.match(after):
        whole = re.search(r"\S*$", before)[0] + match[0] + re.match(r"\S*", after)[0]
        raise UserError(
            f"{match[0]!r} stands in the prompt {match.string!r} as a part of {whole!r}; set "
            "NEGATIVE_PROMPTS to PROMPT without what asks for it"
        )
    edge = before[-1:] + after[:1]
    joint = " " if re.search(r"\s", edge) or not UNSPACED.search(edge) else ""
    named, style = IN_A.search(before), STYLE.match(after)
    if named and style:  # "in blob style"
        before, after = before[: named.start()], after[style.end() :]
    rest = f"{_led_up_to(before)}{joint}{after.strip()}"
    rest = re.sub(r"\s+(?=[\s,])", "", rest).strip(" ,")
    return re.sub(JOINING, "", rest, flags=re.IGNORECASE)


def _with_marks(match: re.Match) -> tuple[int, int]:
    """Where the target begins and ends with the quotes round it, or with its own "'s"."""
    text, (start, end) = match.string, match.span()
    while start and text[start - 1] + text[end : end + 1] in PAIRS:
        start, end = start - 1, end + 1
    own = r"['’]s?(?!\w)" if match[0][-1:] in "sS" else r"['’]s(?!\w)"
    owner = re.match(own, text[end:], re.IGNORECASE)
    return start, end + (owner.end() if owner else 0)


def _led_up_to(before: str) -> str:
    """The text before a target without its article and the joining words."""
    before = re.sub(r"(?:\b(?:a|an|the)\s+)$", "", before, flags=re.IGNORECASE)
    return re.sub(
        r"(?:,|\b(?:in\s+(?:the\s+)?style\s+of|painted by|by|with|and|of|on)\b)\s*$",
        "",
        before.rstrip(),
        flags=re.IGNORECASE,
    ).rstrip()


def _forms(word: str) -> Iterator[str]:
    """The word's plurals, and what it may be the plural of."""
    for one, many in PLURALS:
        for ending, other in ((one, many), (many, one)):
            if word.lower().endswith(ending) and len(word) - len(ending) >= LETTERS:
                yield word[: len(word) - len(ending)] + other


def negatives(prompt: str, targets: list[str], given: str) -> list[str]:
    """One negative prompt for each target: those given, else derived from *this* prompt. UserError
    when the numbers differ.
    """
    for target in targets:
        find_target(prompt, target)
    if not given:
        return [without_target(prompt, target) for target in targets]
    # the only negative may hold commas
    items = split_list(given) if len(targets) > 1 else [given.strip()]
    if len(items) != len(targets):
        raise UserError(
            f"NEGATIVE_PROMPTS has {len(items)} items for {len(targets)} targets; give "
            "NEGATIVE_PROMPTS one each, separated by '|'"
        )
    return items


def contrast_prompts(
    form: str, prompt: str, targets: list[str], given: str = ""
) -> list[tuple[str, str]]:
    """(c+, c-) of each target, in NFC. Negative prompts that are `given` replace c- in every form.

    slider    the prompt against the prompt without the target (Concept-TRAK)
    cfg       the prompt against the empty prompt
    concept   the target's own words against the empty prompt: no other word of the prompt
              takes part in the gradient
    """
    if form not in QUERY_FORMS:
        raise UserError(
            f"QUERY_FORM={form!r} is unknown; set QUERY_FORM to one of {', '.join(QUERY_FORMS)}"
        )
    keys = [" ".join(normalized(target).casefold().split()) for target in targets]
    for i, target in enumerate(targets):
        if keys[i] in keys[:i]:
            raise UserError(
                f"{targets[keys.index(keys[i])]!r} and {target!r} are the same target; name it "
                "once in TARGET_CONCEPTS"
            )
    prompt = normalized(prompt)
    words = [asking_words(prompt, target) for target in targets]
    if form == "slider" or given:
        minus = negatives(prompt, targets, given)
    else:
        minus = [""] * len(targets)
    return list(zip(words if form == "concept" else [prompt] * len(words), minus, strict=True))


def slug(text: str, length: int) -> str:
    """Lower-case words joined by "-", at most `length` characters."""
    return (
        re.sub(r"[^a-z0-9]+", "-", normalized(text).lower()).strip("-")[:length].strip("-")
        or "empty"
    )


def target_slug(target: str) -> str:
    """{slug32}, as in the reference, with a hash where words were cut or letters lost."""
    short = slug(target, 32)
    whole = re.sub(r"\s+", "-", normalized(target).strip().lower()) == short
    return short if whole else f"{short}-{_hash(target)[:6]}"


def target_folders(targets: Sequence[str]) -> list[str]:
    """A folder for each target of an answer; no two share one: "cat dog" beside "cat-dog"."""
    names: list[str] = []
    for target in targets:
        name = f"target_{target_slug(target)}"
        while name in names:
            name += f"-{_hash(target)[:6]}"
        names.append(name)
    return names


def query_slug(prompt: str) -> str:
    """{slug48}-{sha1[:10]} of the prompt, as in the reference."""
    return f"{slug(prompt, 48)}-{_hash(prompt)[:10]}"


def _hash(text: str) -> str:
    return hashlib.sha1(normalized(text).encode()).hexdigest()
