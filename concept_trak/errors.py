"""The one exception that means "the user can mend this": printed as a single line, without a
traceback.
"""

import os
import shlex


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the remedy; the CLI exits with
    status 2.
    """


class TransientError(UserError):
    """What passes by itself: a cut connection, a lock that another process holds. Whoever has the
    time may try again; the message says what was tried.
    """


def script_hint(script: str, **variables: object) -> str:
    """The line that runs a script of the checkout with these variables, to end a refusal with."""
    given = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
    return " ".join([*given, "bash", f"scripts/{script}"])


def remove_hint(path: object, then: str = "run the same again") -> str:
    """The line that removes what is made again where it is missing, to end a refusal with."""
    place = str(path)
    option = "-r " if os.path.isdir(place) else ""
    return f"remove it and {then}: rm {option}{shlex.quote(place)}"


def git_restore_hint(path: object) -> str:
    """The line that brings back a committed file or folder, to end a refusal with."""
    return f"bring back the committed one: git checkout -- {shlex.quote(os.path.relpath(path))}"
