"""`concept-trak bench-service`: a service of its own on loopback, asked by several clients at once.

Every request is another question at first; then the same ones come again, and are known. Latency is
from the connection to the last byte of the answer. A request that is not answered with 200, or not
about what was asked, is an error.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from concept_trak import isolated
from concept_trak.datasets.image_folder import load_folder
from concept_trak.datasets.list_concepts import labelled_questions
from concept_trak.errors import UserError
from concept_trak.flags import add_setting_flags, command, settings_of
from concept_trak.settings import Settings, as_dict, provenance

START_SECONDS, STOP_SECONDS = 600, 600
MARK = "service: "
USES = ("service", "query", "generation", "rows", "projection", "model", "data_dir", "device")


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """The sub-command `bench-service`: its own flags, and every flag of `Settings`."""
    what = "Time a service on loopback: several clients, many questions, then the same ones again."
    add = (sub := verbs.add_parser("bench-service", help=what, description=what)).add_argument
    counts = {"clients": (8, "at a time"), "requests": (200, "questions, each another one")}
    for name, (usual, told) in counts.items():
        told = f"{told} (at least 1; default: {usual})"
        add(f"--{name}", type=int, default=usual, metavar="N", help=told)
    add_setting_flags(sub, USES)
    sub.set_defaults(run=bench)


def bench(arguments: argparse.Namespace) -> None:
    """Print a table, then one JSON object as the last line. UserError for numbers below 1, and for
    a service that does not start or stop.
    """
    if min(arguments.clients, arguments.requests) < 1:
        raise UserError("--clients and --requests must be at least 1")
    settings = settings_of(arguments)
    asked = questions(settings, arguments.requests)
    with tempfile.TemporaryDirectory() as folder, started(settings, Path(folder)) as service:
        print(f"{len(asked)} questions, {arguments.clients} clients, {service.address}", flush=True)
        rounds = {name: load(service, asked, arguments.clients) for name in ("new", "known")}
        peak = service.peak_gib()
    print(table(rounds))
    new = rounds["new"]
    result = {
        "requests": len(new.seconds),
        "errors": sum(len(r.errors) for r in rounds.values()),
        "p50_ms": new.percentile(50),
        "p95_ms": new.percentile(95),
        "per_second": round(len(new.seconds) / new.took, 3),
        "known": {
            "requests": len(rounds["known"].seconds),
            "p50_ms": rounds["known"].percentile(50),
            "p95_ms": rounds["known"].percentile(95),
        },
        "clients": arguments.clients,
        "peak_gib": peak,
        "settings": as_dict(settings),
        "provenance": provenance(),
    }
    print(json.dumps(result))
    if result["errors"]:
        first = next(r.errors[0] for r in rounds.values() if r.errors)
        raise UserError(
            f"{result['errors']} requests were not answered, the first: {first}; see what the "
            f"service says alone: {command('serve', settings, USES)}"
        )


def questions(settings: Settings, count: int) -> list[dict[str, Any]]:
    """`count` different questions: labelled captions and their concepts in an order drawn with
    SEED, each with one seed after another once all have been asked. UserError without labels.
    """
    known = list(labelled_questions(load_folder(settings.data_dir)))
    if not known:
        raise UserError(f"{settings.data_dir} has no labels to ask about; set DATA_DIR=data/emoji")
    random.Random(settings.seed).shuffle(known)
    return [
        {"prompt": prompt, "concepts": concepts, "seed": i // len(known)}
        for i, (prompt, concepts) in zip(range(count), known * (count // len(known) + 1))  # noqa: B905
    ]


@dataclass
class Load:
    """What clients met. seconds: of each request; took: from the first to the last, in seconds."""

    seconds: list[float]
    errors: list[str]
    took: float

    def percentile(self, percent: int) -> float:
        """Milliseconds in which so many percent of the requests were answered (nearest rank)."""
        ordered = sorted(self.seconds)
        place = max(0, -(-percent * len(ordered) // 100) - 1)
        return round(1e3 * ordered[place], 1)


class Running:
    """A service in a process of its own."""

    def __init__(self, process: subprocess.Popen, address: str, log: Path) -> None:
        self.process, self.address, self.log = process, address, log
        self.token = os.environ.get("API_TOKEN", "")

    def connection(self) -> http.client.HTTPConnection:
        """A new connection."""
        place = urlsplit(self.address)
        return http.client.HTTPConnection(place.hostname or "", place.port, timeout=START_SECONDS)

    def call(
        self, via: http.client.HTTPConnection, path: str, body: Any = None
    ) -> tuple[int, bytes]:
        """(status, content); a body is sent as JSON."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        sent = None if body is None else json.dumps(body)
        via.request("GET" if body is None else "POST", path, sent, headers)
        answer = via.getresponse()
        return answer.status, answer.read()

    def peak_gib(self) -> float | None:
        """Most memory that the process has held; None where the system does not tell."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return round(int(peak.split()[1]) / 2**20, 2)


@contextmanager
def started(settings: Settings, folder: Path) -> Iterator[Running]:
    """A service of these settings on a free port, its answers in `folder`; ended by SIGTERM, after
    which it must end by itself and well.
    """
    own = {"listen_host": "127.0.0.1", "listen_port": 0, "results_dir": str(folder / "results")}
    own["answer_wait"] = max(settings.answer_wait, 3600.0)
    given = settings.flat() | own
    flags = [f"--{k.replace('_', '-')}={int(v) if v is True else v}" for k, v in given.items()]
    log = folder / "service.log"
    with open(log, "wb") as told:
        line = isolated.command("concept_trak", "serve", *flags)
        process = subprocess.Popen(line, stdout=told, stderr=subprocess.STDOUT)
    try:
        yield Running(process, _address(process, log, settings), log)
        process.send_signal(signal.SIGTERM)
        if process.wait(STOP_SECONDS) != 0:
            raise _gives_up(settings, f"it ended with {process.returncode} ({_last_line(log)})")
    except subprocess.TimeoutExpired:
        raise _gives_up(settings, f"it did not stop within {STOP_SECONDS} s") from None
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen, log: Path, settings: Settings) -> str:
    """Where it listens, once it says so."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        time.sleep(0.1)
    raise _gives_up(settings, _last_line(log))


def _gives_up(settings: Settings, what: str) -> UserError:
    """Of a service that did not start or stop well."""
    alone = command("serve", settings, USES)
    return UserError(f"the service could not be measured: {what}; see what it says alone: {alone}")


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]


def load(service: Running, asked: Sequence[dict[str, Any]], clients: int) -> Load:
    """Ask all the questions, each client the next one as soon as it has an answer."""
    left, seconds, errors = iter(asked), [], []
    lock = threading.Lock()

    def client() -> None:
        via = service.connection()
        while True:
            with lock:
                question = next(left, None)
            if question is None:
                return via.close()
            begun, wrong = time.monotonic(), ""
            try:
                wrong = _wrong(question, *service.call(via, "/answers", question))
            except (OSError, http.client.HTTPException, ValueError) as error:
                via.close()
                wrong = f"{type(error).__name__}: {error}"
            with lock:
                seconds.append(time.monotonic() - begun)
                errors.extend([wrong] if wrong else [])

    begun = time.monotonic()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(seconds, errors, time.monotonic() - begun)


def _wrong(question: dict[str, Any], status: int, content: bytes) -> str:
    """What is wrong with an answer; "" for a right one."""
    if status != 200:
        return f"status {status}: {content[:200].decode(errors='replace')}"
    told = json.loads(content)
    if told["prompt"] != question["prompt"]:
        return f"an answer about {told['prompt']!r} for {question['prompt']!r}"
    named = [concept["concept"] for concept in told["concepts"]]
    return "" if named == question["concepts"] else f"scores of {named}"


def table(rounds: dict[str, Load]) -> str:
    """A line a round: requests, errors, requests a second, percentiles in ms."""
    head = f"{'questions':10} {'requests':>8} {'errors':>6} {'1/s':>7}"
    lines = [head + "".join(f" {f'p{p} ms':>10}" for p in PERCENTILES)]
    for name, found in rounds.items():
        line = f"{name:10} {len(found.seconds):8} {len(found.errors):6}"
        line += f" {len(found.seconds) / found.took:7.2f}"
        lines.append(line + "".join(f" {found.percentile(p):10.1f}" for p in PERCENTILES))
    return "\n".join(lines) + "\n"


PERCENTILES = (5, 50, 95, 99, 100)
