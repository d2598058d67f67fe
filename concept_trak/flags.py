"""Settings as command-line flags: NUM_SPLIT -> --num-split; only what the user set overrides the
recipe.
"""

from __future__ import annotations

import argparse
import dataclasses

from .settings import BENCHMARKS, Settings, resolve


def boolean(text: str) -> bool:
    """0/1, false/true, no/yes; the empty string is false."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")


def add_setting_flags(sub: argparse.ArgumentParser) -> None:
    """--benchmark and one flag for each field of `Settings`, None when not given."""
    sub.add_argument("--benchmark", default="emoji", choices=sorted(BENCHMARKS))
    for field in dataclasses.fields(Settings):
        kind = {"bool": boolean, "int": int, "float": float}.get(field.type, str)
        sub.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=None, metavar=field.type.upper()
        )


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Settings from the parsed flags. UserError for a value that does not exist."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    return resolve(
        arguments.benchmark,
        {k: v for k, v in vars(arguments).items() if k in fields and v is not None},
    )
