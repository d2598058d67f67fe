"""Settings as command-line flags: NUM_SPLIT -> --num-split; only what the user set overrides the
recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from .errors import UserError
from .parsing import Option, nearest
from .settings import (
    IN_CHECKOUT,
    PRESETS,
    ROOT,
    SECTIONS,
    STAGE_OF,
    Settings,
    as_dict,
    flat_fields,
    names,
    resolve,
)

FROM_ENV = "CONCEPT_TRAK_FROM_ENV"  # set by the scripts, which make flags of variables
# variables of the scripts that are no settings
SCRIPT_VARIABLES = (
    *"PYTHON_BIN ENV_KIND TORCH_INDEX_URL PARTS MAX_WORKERS PRESET OUT_DIR WORK SIZE".split(),
    *("API_TOKEN", "RAY_ADDRESS"),
)
SHORTEST = 5  # letters of a variable whose neighbours are looked at: ETA is near to too much
SHOWN_AS = {"bool": "0|1", "int": "N", "float": "X", "str": "TEXT"}


def boolean(text: str) -> bool:
    """0/1, false/true, no/yes; the empty string is false."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")


def place(text: str) -> str:
    """A path that is needed where it is given: not the empty string."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


class BenchmarkHelp(argparse.Action):
    """-h: every flag with the defaults of the benchmark, if that was named before."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        parser.with_defaults(getattr(namespace, "benchmark", "emoji")).print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A wrong flag is a user's mistake like any other: one line, without the usage.

    later: adds the flags of `Settings` when the parser is used, one verb of many in a start.
    settings: {action: field} of the flags that the help shows.
    """

    def __init__(self, **options: Any) -> None:
        layout = {"formatter_class": layout_of, "usage": "%(prog)s [--FLAG VALUE ...]"}
        super().__init__(**layout | options | {"add_help": False})
        self.later: Callable[[], None] | None = None
        self.settings: dict[argparse.Action, dataclasses.Field] = {}
        self.add_argument("-h", "--help", action=BenchmarkHelp, nargs=0, help="show this and end")
        how = {"action": "store_const", "dest": "level", "default": argparse.SUPPRESS}
        self.add_argument("-q", "--quiet", const=-1, help="say only results and errors", **how)
        says = "say when what is done, and where an error comes from"
        self.add_argument("-v", "--verbose", const=1, help=says, **how)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def complete(self) -> Parser:
        """The parser with all its flags."""
        add, self.later = self.later, None
        if add is not None:
            add()
        return self

    def with_defaults(self, benchmark: str) -> Parser:
        """The parser, its help telling the defaults of a benchmark."""
        if self.settings:
            defaults = as_dict(resolve(benchmark, {}))
            for action, field in self.settings.items():
                action.help = describe(field.metadata["option"], defaults[field.name])
        return self

    def flags_of(self, verb: str) -> list[str]:
        """The flags of a sub-command."""
        (verbs,) = self._subparsers._group_actions
        return [*verbs.choices[verb]._option_string_actions]

    def list_apart(self, title: str, verbs: Any, start: int) -> None:
        """Show the sub-commands from number `start` on under a title of their own."""
        apart, verbs._choices_actions[start:] = verbs._choices_actions[start:], []
        self.add_argument_group(title)._group_actions.extend(apart)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = nearest(value, action.choices, 1)
            meant = f"did you mean {near[0]}?" if near else "there are " + ", ".join(action.choices)
            self.error(f"there is no verb {value!r}; {meant}")
        super()._check_value(action, value)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is left over: what is not known is refused, with the nearest flag there is."""
        self.complete()
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            flag = left[0].partition("=")[0]
            near = nearest(flag, self._option_string_actions, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(left)}{meant}")
        return parsed, left


def layout_of(prog: str) -> argparse.HelpFormatter:
    """Flags in a column of their own; the description and the examples as they were written."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30)


def describe(option: Option, default: Any) -> str:
    """A flag's line of help: what it is (unit; what is allowed; the default)."""
    notes = [option.unit, limits(option)]
    if any(name not in option.help for name in option.allowed()):
        notes.append(", ".join(option.allowed()))
    shown = int(default) if isinstance(default, bool) else default
    if shown != "" or "empty:" not in option.help:
        notes.append(f"default: {'empty' if shown == '' else shown}")
    told = "; ".join(filter(None, notes))
    return f"{option.help} ({told})".replace("%", "%%") if told else option.help


def limits(option: Option) -> str:
    """Bounds as words; an upper one that nobody reaches is left out."""
    if option.low is None:
        return ""
    far = option.high is None or option.high > 10**9
    return f"at least {option.low}" if far else f"{option.low} to {option.high}"


def add_setting_flags(sub: Any, uses: Sequence[str] | None = None) -> None:
    """--benchmark and one flag for each field of `Settings`, None when not given.

    sub: a `Parser`. uses: stages and fields that its help shows, by default all; the others are
    accepted without a word, since scripts pass on every variable that is set.
    """
    sub.add_argument(
        "--benchmark",
        default="emoji",
        metavar="NAME",
        help=f"whose defaults apply: {', '.join(PRESETS)}, or one that is registered; "
        "named before --help, those are shown (default: emoji)",
    )
    sub.later = functools.partial(_add_fields, sub, uses)


def _add_fields(sub: Parser, uses: Sequence[str] | None) -> None:
    for stage, fields in SECTIONS.items():
        group = sub.add_argument_group(fields.__doc__.rstrip("."))
        for field in dataclasses.fields(fields):
            shown = uses is None or stage in uses or field.name in uses
            action = (group if shown else sub).add_argument(
                f"--{field.name.replace('_', '-')}",
                type={"bool": boolean, "int": int, "float": float}.get(field.type, str),
                default=None,
                metavar=SHOWN_AS[field.type],
                help=None if shown else argparse.SUPPRESS,
            )
            if shown:
                sub.settings[action] = field


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Settings from the parsed flags. UserError for a value that does not exist, and for
    SEARCH=index where a verb needs the scores of all pictures. EDITS where they have no effect is
    told, not refused: scripts pass on what was exported for others. A parser tells by defaults of
    its own which verbs these are: `needs_all_scores` (LDS, recall, average precision) and
    `reads_edits`; of `attribute` with WEIGHTS=1 the part on weights does.
    """
    given = {k: v for k, v in vars(arguments).items() if k in names() and v is not None}
    settings, verb = resolve(arguments.benchmark, given), getattr(arguments, "verb", "")
    reads_edits = getattr(arguments, "reads_edits", verb == "attribute" and settings.weights)
    if settings.edits and not reads_edits:
        where = "without WEIGHTS=1" if verb == "attribute" else f"on {verb}"
        told = f"EDITS has no effect {where}, which takes the model as it is"
        print(f"warning: {told}; leave it out: unset EDITS", file=sys.stderr)
    if settings.search == "index" and getattr(arguments, "needs_all_scores", False):
        raise UserError(
            f"{verb} needs the scores of all pictures, and an index knows those of the "
            "highest and lowest only: leave SEARCH out, or set SEARCH=scan"
        )
    return settings


def check_environment(environment: Mapping[str, str], flags: Collection[str]) -> None:
    """UserError for a variable that is none of the known ones, but near to one: it would be passed
    over without a word. flags: of the verb, e.g. "--steps", whose variables are known, too.
    """
    known = {*(name.upper() for name in names()), *SCRIPT_VARIABLES}
    known |= {flag.lstrip("-").replace("-", "_").upper() for flag in flags}
    aims = [name for name in known if len(name) >= SHORTEST]
    for variable in sorted(environment.keys() - known):
        same = [name for name in aims if name.replace("_", "") == variable.replace("_", "")]
        if near := same or (len(variable) >= SHORTEST and nearest(variable, aims, 1)):
            raise UserError(
                f"the variable {variable} is set, but no setting has that name; did you mean "
                f"{near[0]}? Rename it, or leave it out: unset {variable}"
            )


def command(verb: str, settings: Settings, uses: Sequence[str], **also: str) -> str:
    """The command line that runs a verb under these settings: a script with variables where the
    checkout has one for the verb, else the program with flags.

    uses: stages and fields that bear on the verb; others are left out, as is what is the default of
    the benchmark, of those there are the one with the fewest differences. also: further variables.
    """
    shown = [f.name for f in flat_fields() if f.name in uses or STAGE_OF[f.name] in uses]

    def differences(benchmark: str) -> dict[str, Any]:
        base = resolve(benchmark, {"recipe": settings.recipe})
        own = {"recipe": PRESETS[benchmark].get("recipe", "default")}
        usual = [x.flat() | own for x in (base, base.on("cpu"), base.on("cuda"))]
        return {
            name: getattr(settings, name)
            for name in shown
            if getattr(settings, name) not in [x[name] for x in usual]
        }

    benchmark, changed = min(
        ((name, differences(name)) for name in PRESETS), key=lambda pair: len(pair[1])
    )
    given = {k: str(int(v) if isinstance(v, bool) else v) for k, v in changed.items()} | also
    return command_line(verb, benchmark, given)


def command_line(verb: str, benchmark: str, given: Mapping[str, str]) -> str:
    """The command line that runs a verb for a benchmark with these {setting: value}."""
    if script := script_of(verb, benchmark):
        told = [f"{name.upper()}={shlex.quote(value)}" for name, value in given.items()]
        return " ".join([*told, "bash", script])
    told = [f"--{name.replace('_', '-')}={shlex.quote(value)}" for name, value in given.items()]
    return " ".join(["concept-trak", verb, "--benchmark", benchmark, *told])


def script_of(verb: str, benchmark: str) -> str | None:
    """The script that does no more than to run the verb for the benchmark, as one calls it from
    here; None where there is no checkout.
    """
    line = f'\nrun_verb {verb} --benchmark {benchmark} "$@"\n'
    scripts = (ROOT / "scripts").rglob("*.sh") if IN_CHECKOUT else ()
    found = sorted((len(path.name), path) for path in scripts if path.read_text().endswith(line))
    return os.path.relpath(found[0][1]) if found else None
