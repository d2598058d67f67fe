"""Python that finds code only where its own lies, and this package.

`python -m` puts the working folder before everything, `python script.py` that of the script, and
an empty item of PYTHONPATH stands for the working folder: a json.py among downloaded pictures would
be run. Python's isolated mode (-I), which has none of them, in Python 3.10 as well, is passed on by
multiprocessing. So each process of ours begins with

    python -I -u concept_trak/isolated.py MODULE [ARGUMENT ...]

Imports nothing but the standard library.
"""

from __future__ import annotations

import os
import sys

# The checkout, or the site-packages of an installed package; never the working folder, as ROOT may.
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module, as `python -m` would."""
    return [sys.executable, "-I", "-u", os.path.abspath(__file__), module, *arguments]


def isolate() -> None:
    """Go on as the isolated process of the same verb, where this one is not isolated."""
    if not sys.flags.isolated and sys.executable:
        os.execv(sys.executable, command("concept_trak", *sys.argv[1:]))


def python_path() -> list[str]:
    """Where other processes find this package: the folders that PYTHONPATH names whole, without
    the working folder, and before them a checkout.
    """
    items = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = [HERE] if os.path.exists(os.path.join(HERE, "pyproject.toml")) else []
    items = [item for item in items if os.path.isabs(item) and not _is_working_folder(item)]
    return list(dict.fromkeys(own + items))


def _is_working_folder(path: str) -> bool:
    try:
        return os.path.samefile(path, os.curdir)
    except OSError:  # one of them is not there
        return False


def _run() -> None:
    """Run the module that the arguments name, and give the processes that it starts, which may not
    be isolated, an environment that is as safe.
    """
    import runpy
    import site

    paths = python_path()
    sys.path[:0] = [path for path in paths if path not in sys.path]
    user = site.getusersitepackages()  # which -I leaves out, with what pip installed there
    wanted = not os.environ.get("PYTHONNOUSERSITE") and sys.prefix == sys.base_prefix
    if wanted and os.path.isabs(user):
        site.addsitedir(user)
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    os.environ.pop("PYTHONOPTIMIZE", None)  # at 2 transformers misses its docstrings
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
