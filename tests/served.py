"""Scripts are run as they are, by bash; the Python that they call is this process, which has
imported everything already.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from concept_trak import cli

# What a script finds as its Python: it hands over what it was called with, and says what came back.
CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
file = server.makefile("rw")
print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), file=file, flush=True)
out, err, code = json.loads(file.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
SECONDS = 300.0


def run(line, folder, cwd, **variables):
    """A finished `subprocess.CompletedProcess` of a command line, called with these variables.

    folder: a short path, for the socket.
    """
    address, client = str(folder / "s"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    env = os.environ | {k: str(v) for k, v in variables.items()}
    env |= {"PYTHON_BIN": str(client), "PATH": f"{folder}:{os.environ['PATH']}"}
    with socket.socket(socket.AF_UNIX) as server:
        Path(address).unlink(missing_ok=True)
        server.bind(address)
        server.listen()
        server.settimeout(0.1)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(["bash", "-c", line], cwd=cwd, env=env, **pipes)
        try:
            while process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    serve(server.accept()[0])
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def serve(connection):
    """Run the verb that a script asks for, and tell it what was printed."""
    with connection, connection.makefile("rw") as file:
        argv, env, cwd = json.loads(file.readline())
        assert argv[:2] == ["-I", "-u"] and argv[3] == "concept_trak", argv
        out, err, before, here = io.StringIO(), io.StringIO(), dict(os.environ), os.getcwd()
        os.environ.update(env)
        os.chdir(cwd)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = cli.main(argv[4:])
                except SystemExit as end:
                    code = end.code
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)
        print(json.dumps([out.getvalue(), err.getvalue(), code or 0]), file=file, flush=True)
