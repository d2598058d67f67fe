"""`concept-trak VERB`: every field of `Settings` is a flag (NUM_SPLIT -> --num-split);
one line for a user's mistake.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback

from .errors import UserError
from .flags import FROM_ENV, Parser, check_environment
from .isolated import isolate
from .process import VERBOSITY, ended_by_sigterm, set_verbosity, speak_plainly
from .report import component_command
from .settings import IN_CHECKOUT, version
from .verbs import VERBS, add_export, add_settings_verb

LINE = 1000  # characters of a message, whatever it quotes


def parser() -> Parser:
    """One sub-command a verb; flags without a default, so that only what the user set overrides the
    recipe. In a checkout the verbs of its experiments stand under a heading of their own.
    """
    top = Parser(
        prog="concept-trak",
        description="Which training images taught a diffusion model a concept?",
        usage="%(prog)s VERB [--FLAG VALUE ...]",
        epilog="concept-trak VERB --help shows the flags of a verb, grouped, with their defaults.",
    )
    top.add_argument("--version", action="version", version=f"concept-trak {version()}")
    verbs = top.add_subparsers(
        dest="verb", required=True, title="verbs", metavar="VERB", prog=top.prog
    )
    for name, verb in VERBS.items():
        add_settings_verb(verbs, name, verb)
    add_export(verbs)
    component_command.add_parser(verbs)
    if IN_CHECKOUT:
        of_library = len(verbs._choices_actions)
        importlib.import_module("experiments.cli").add_verbs(verbs)
        top.list_apart("verbs of the experiments", verbs, of_library)
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 2 with one line on standard error for a UserError, and for what the
    system refuses: a file, memory.
    """
    if argv is None:  # of the installed script
        isolate()
    speak_plainly()
    set_verbosity(0)  # until the arguments say otherwise
    try:
        with ended_by_sigterm():
            top = parser()
            arguments = top.parse_args(argv)
            set_verbosity(getattr(arguments, "level", 0))
            if os.environ.get(FROM_ENV):
                check_environment(os.environ, top.flags_of(arguments.verb))
            arguments.run(arguments)
    except BrokenPipeError:  # whoever reads the output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError, MemoryError, UnicodeError) as error:
        if VERBOSITY["level"] > 0:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch has no class of its own for the CPU's
        if "memory" not in str(error):
            raise
        print(f"error: {one_line(MemoryError(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def one_line(error: BaseException) -> str:
    """What went wrong and what mends it, in a line of bounded length."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        text = f"out of memory ({text}); set BATCH_SIZE, PROJ_DIM or MAX_MEMORY lower"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; mend that and run again"
    elif not isinstance(error, UserError):
        text = f"{text or type(error).__name__}; mend that and run again"
    return text if len(text) <= LINE else f"{text[: LINE // 2]} ... {text[-LINE // 2 :]}"
