"""The verb `serve`: one model, one worker, and the addresses of `app` until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..attribution.task import AttributionTask
from ..errors import UserError
from ..process import VERBOSITY, log
from ..settings import Settings

if TYPE_CHECKING:
    from .job_queue import JobQueue

TOKEN = "API_TOKEN"  # a variable and no setting: settings are written beside every answer
NEEDS = (
    "the service needs fastapi, uvicorn and prometheus_client; run: "
    "pip install 'concept-trak[serve]'"
)
CONNECTIONS = 512  # beyond the queue, at a time
SECOND_INTERRUPT = 130


def serve(settings: Settings, device: str) -> None:
    """Answer questions over HTTP until SIGTERM or SIGINT; then all that was accepted is answered.

    UserError for packages, rows or a token that are not there, and a port that is taken.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError(NEEDS) from None
    from .app import make_app
    from .job_queue import JobQueue
    from .metrics import Metrics
    from .middleware import RequestLimits, validate_token

    s = settings
    token = validate_token(os.environ.get(TOKEN, ""), s.listen_host)
    with listening(s.listen_host, s.listen_port) as bound:
        counts = Metrics()
        task = AttributionTask(s, device)
        task.preconditioner  # noqa: B018 - too little MAX_MEMORY is told before any question
        queue = JobQueue(task, counts.answered)
        app = make_app(queue, RequestLimits(token, s.body_bytes, s.body_timeout), counts)
        if taken := queue.resume():
            log(f"{taken} questions that an ended service had accepted are answered first")
        bound.listen(CONNECTIONS)  # who reads the line may connect at once, and is then served
        print(f"service: {address_of(bound)}", flush=True)
        run(app, queue, bound)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to an address, before anything is loaded; it takes connections once it is
    served. UserError for one that is taken or is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"LISTEN_HOST={host} is no address ({reason}); leave it out: unset LISTEN_HOST"
        ) from None
    family, kind, protocol, _, place = found[0]
    bound = socket.socket(family, kind, protocol)
    with contextlib.closing(bound):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(place)
        except OSError as error:
            raise UserError(
                f"{host} port {port} cannot be listened at ({error.strerror}); choose another "
                "port: LISTEN_PORT=0 bash scripts/serve.sh"
            ) from None
        yield bound


def address_of(bound: socket.socket) -> str:
    """As a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: Any, queue: JobQueue, bound: socket.socket) -> None:
    """Serve until a signal, and then, with 503 for new questions, until all that was accepted is
    answered. A second SIGINT ends at once: what is accepted is written down, and the next service
    takes it up.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            queue.stop()
            if left := queue.unanswered:
                log(f"stopping: {left} accepted questions are answered first; Ctrl-C ends at once")
            while queue.unanswered and not self.force_exit:
                await asyncio.sleep(0.1)
            await super().shutdown(sockets)

    quiet = VERBOSITY["level"] <= 0
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_level="warning" if quiet else "info",
        proxy_headers=False,
        server_header=False,
        use_colors=False,
        limit_concurrency=CONNECTIONS + queue.length,
    )
    config.load()
    protocol = config.http_protocol_class
    config.http_protocol_class = patient(protocol, queue.head_timeout, CONNECTIONS)
    server = Server(config)
    with contextlib.suppress(
        SystemExit, KeyboardInterrupt
    ):  # uvicorn repeats the signal at its end
        server.run(sockets=[bound])
    if queue.unanswered:
        print("ended; the accepted questions are kept for the next start", file=sys.stderr)
        sys.stderr.flush()
        os._exit(SECOND_INTERRUPT)  # the worker is in the middle of an answer
    queue.close()
    log("stopped: every accepted question is answered")


def patient(protocol: Any, seconds: float, most: int) -> Any:
    """uvicorn's protocol, which waits without end, with an end: a connection that in so many
    seconds neither sends a whole head nor takes any of its answer is cut off; and of more than
    `most` at once the one that has asked nothing for longest.
    """
    opened: dict[Any, Any] = {}  # connection -> its timer, the oldest first

    class Patient(protocol):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            opened[self] = self.loop.call_later(seconds, self.look, self.state())
            if len(opened) > most:
                idle = (each for each in opened if each is not self and not each.state()[1])
                if oldest := next(idle, None):
                    oldest.cut_off()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if timer := opened.pop(self, None):
                timer.cancel()

        def state(self) -> tuple[Any, bool, int]:
            """(the last request, whether it is being answered, bytes that wait to be taken)."""
            asking = self.cycle is not None and not self.cycle.response_complete
            return self.cycle, asking, self.transport.get_write_buffer_size()

        def look(self, before: tuple[Any, bool, int]) -> None:
            now = self.state()
            if now == before and (now[2] or not now[1]):
                self.cut_off()
            elif self in opened:
                opened[self] = self.loop.call_later(seconds, self.look, now)

        def cut_off(self) -> None:
            self.transport.abort()
            self.connections.discard(self)  # at once: the next one is not to be turned away for it
            if timer := opened.pop(self, None):
                timer.cancel()

    return Patient
