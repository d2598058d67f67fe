"""A server on this machine that speaks S3 (moto), and a proxy before it that cuts connections.

moto needs other versions than this package, so it lives in an environment of its own, `.venv-s3`
of the checkout, which .ci/run makes; MOTO_SERVER names another.
"""

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def moto_server():
    """The program; the test is skipped where there is none."""
    own = REPOSITORY / ".venv-s3/bin/moto_server"
    found = os.environ.get("MOTO_SERVER") or (own if own.exists() else shutil.which("moto_server"))
    if not found or not os.access(found, os.X_OK):
        pytest.skip(f"no moto_server in .venv-s3 (bash .ci/run makes it) or MOTO_SERVER: {found}")
    return str(found)


class Server:
    """A moto server; its buckets are gone when it ends."""

    def __init__(self, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [moto_server(), "-H", "127.0.0.1", "-p", str(self.port)]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.1)
        raise AssertionError(f"moto did not start: {Path(log).read_text()[-400:]}")

    def stop(self):
        self.process.kill()
        self.process.wait()


class Proxy:
    """Passes connections on to a port. `cut_after(bytes)`: the next connections that carry more
    than that, in either direction, are reset there; `down` refuses all.
    """

    def __init__(self, target):
        self.target, self.cuts, self.down, self.counted = target, [], False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, *sizes):
        self.cuts.extend(sizes)

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        if self.down:
            return reset(client)
        server = socket.create_connection(("127.0.0.1", self.target))
        ways = [(client, server), (server, client)]
        threads = [threading.Thread(target=self._pass, args=way, daemon=True) for way in ways]
        for thread in threads:
            thread.start()

    def _pass(self, source, sink):
        carried = 0
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                carried += len(data)
                if self.down or (self.cuts and carried > self.cuts[0]):
                    if not self.down:
                        self.cuts.pop(0)
                        self.counted += 1
                    break
                sink.sendall(data)
            else:
                return sink.shutdown(socket.SHUT_WR)
        reset(source)
        reset(sink)

    def stop(self):
        self.listener.close()


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with `answer`, (status, code of S3); `asked` counts them."""

    answer, asked = (403, "AccessDenied"), 0

    def do_GET(self):
        type(self).asked += 1
        status, code = self.answer
        body = f"<Error><Code>{code}</Code><Message>told of {code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def refusing(status, code):
    """(handler, port) of a server that refuses everything."""
    handler = type("Handler", (Refusing,), {"answer": (status, code)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield handler, server.server_port
    server.shutdown()
    server.server_close()


def reset(connection):
    """Close at once, without the end of the stream."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
