"""The desk: a bounded queue before one worker, which alone touches the model.

What is accepted is written down first (`.asked/ID.json` beside the answers) and struck out when it
is answered, so that not even `kill -9` loses it: the next service takes it up. An answer is
`report.write.attribute`'s folder, the one that the command line makes of the same settings, and
one that is there already is not made again.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..atomic_io import disk_errors, make_folder, write_json
from ..attribution.answer import resolve_targets
from ..attribution.naming import answer_folder
from ..attribution.preflight import check_targets
from ..attribution.task import AttributionTask
from ..attribution.train_grad import open_store
from ..errors import UserError, remove_hint
from ..process import log
from ..report.answers_index import PAGE
from ..report.write import attribute
from ..settings import Settings, provenance
from ..store.store import Store
from ..validated_io import NAME_BYTES, read_json
from .request_schema import make_request_model, service_defaults, settings_of

ASKED = ".asked"  # folder of what is accepted and not yet answered, beside the answers
KEPT_FAILURES = 256  # so many of the last ones are told to who asks again
RECENT = 16  # answers whose mean time says when to come again
FIRST_GUESS = 5.0  # seconds, before any answer was made


class InvalidQuery(Exception):
    """The question cannot be answered by anyone; one sentence."""


class QueryFailed(Exception):
    """The service could not answer; one sentence."""


class QueueFull(Exception):
    """The queue is full. after: seconds, when to come again."""

    def __init__(self, after: int) -> None:
        super().__init__("the queue is full; ask again later")
        self.after = after


class ShuttingDown(Exception):
    """The service takes no more questions."""


@dataclass(eq=False)
class Job:
    """A question that was accepted.

    made: ends with the folder of the answer, `InvalidQuery` or `QueryFailed`.
    """

    name: str
    settings: Settings
    made: Future[Path] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


@dataclass
class QueueStats:
    """What became of questions since the start: {outcome: how many}, and seconds of the last."""

    outcomes: dict[str, int] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def mean(self) -> float:
        """Seconds an answer."""
        return sum(self.recent) / len(self.recent) if self.recent else FIRST_GUESS


class JobQueue:
    """Takes questions for one task.

    Attributes: task; store, its rows, checked once; folder, of the answers; question, the model
    of a request. answered: called with (outcome, seconds) of each job.
    """

    def __init__(
        self, task: AttributionTask, answered: Callable[[str, float], None] = lambda *_: None
    ) -> None:
        usual = task.settings.but(**service_defaults())
        self.length, self.wait = task.settings.queue_length, task.settings.answer_wait
        self.head_timeout = task.settings.body_timeout  # of a head as of a body
        self.task, self.answered = task.with_settings(usual), answered
        self.question = make_request_model(usual)
        self.store = open_store(self.task)
        self._checksum, self._rows = self.store.checksum, _stamps(self.store)
        self.provenance = provenance()
        self.folder = Path(usual.results_dir) / "free_query"
        self.stopping = False
        self.tally = QueueStats()
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # accepted, not yet answered
        self._failures: OrderedDict[str, Exception] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "answers")

    # ---- questions

    def read(self, asked: BaseModel) -> Settings:
        """The settings of a question. Refused for words or values that do not fit."""
        try:
            settings = settings_of(asked, self.task.settings)
            check_targets(settings, self.task.everything)
        except UserError as error:
            raise InvalidQuery(str(error)) from None
        return settings

    def name_of(self, settings: Settings) -> str:
        """The name of the answer's folder, by all that decides it."""
        return answer_folder(settings, self._checksum).name

    def known(self, name: str) -> Path | None:
        """The folder of an answer that need not be made; None for one that is not there, or that
        other code, packages or machine made.
        """
        folder = self.folder / name
        if self.task.settings.force_recompute_concept_grad or not self.is_there(name):
            return None
        try:
            path = next(folder.glob("target_*/metrics.json"))
            record = read_json(path, remove_hint(path, "ask again"))
        except (UserError, StopIteration):
            return None
        return folder if record.get("provenance") == self.provenance else None

    def is_there(self, name: str) -> bool:
        """Whether there is an answer of that name, whoever made it."""
        plain = name == Path(name).name and not name.startswith(".")
        short = len(name.encode(errors="replace")) <= NAME_BYTES
        return plain and short and "\0" not in name and (self.folder / name / PAGE).is_file()

    def ask(self, settings: Settings, asked: BaseModel, resumed: bool = False) -> Job:
        """Accept a question, or join the one that was accepted before.

        Raises Full, Stopping, and UserError for a disk that does not take it.
        """
        name = self.name_of(settings)
        with self._lock:
            if self.stopping:
                raise ShuttingDown
            if name in self._jobs:
                return self._jobs[name]
            if len(self._jobs) > self.length and not resumed:
                raise QueueFull(max(1, round(self.tally.mean() * len(self._jobs))))
            self._write_down(name, asked)
            job = self._jobs[name] = Job(name, settings)
            self._failures.pop(name, None)
            self._worker.submit(self._work, job)
        return job

    def job(self, name: str) -> Job | None:
        """The accepted question of that name; None once it is answered."""
        with self._lock:
            return self._jobs.get(name)

    def before(self, name: str) -> int:
        """How many questions are answered before this one; 0 while it is being answered."""
        with self._lock:
            return list(self._jobs).index(name) if name in self._jobs else 0

    def failure(self, name: str) -> Exception | None:
        """Why a question was not answered, of the last ones."""
        with self._lock:
            return self._failures.get(name)

    @property
    def unanswered(self) -> int:
        """Questions accepted and not yet answered."""
        with self._lock:
            return len(self._jobs)

    # ---- the worker

    def _work(self, job: Job) -> None:
        started, outcome = time.monotonic(), "answered"
        folder: Path | None = None
        error: Exception | None = None
        try:
            folder = self._answer(job)
        except InvalidQuery as refusal:
            outcome, error = "refused", refusal
        except BaseException as fault:  # noqa: BLE001 - whatever it is, who asked is told
            traceback.print_exc()
            outcome, error = "failed", QueryFailed(_sentence(fault))
        seconds = time.monotonic() - started
        with self._lock:
            self._jobs.pop(job.name, None)
            self.tally.outcomes[outcome] = self.tally.outcomes.get(outcome, 0) + 1
            if error is None:
                self.tally.recent.append(seconds)
            else:
                self._failures[job.name] = error
                while len(self._failures) > KEPT_FAILURES:
                    self._failures.popitem(last=False)
            self._strike_out(job.name)
        self.answered(outcome, seconds)
        if folder is not None:
            job.made.set_result(folder)
        else:
            job.made.set_exception(error)

    def _answer(self, job: Job) -> Path:
        if folder := self.known(job.name):  # made since it was asked, or by the command line
            return folder
        task = self.task.with_settings(job.settings)
        try:
            resolve_targets(task)
        except UserError as error:
            raise InvalidQuery(str(error)) from None
        self._refuse_other_rows()
        folder = attribute(task, self.store).parent
        try:
            self._refuse_other_rows()
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)  # of rows that its name does not tell of
            raise
        return folder

    def _refuse_other_rows(self) -> None:
        """UserError once the files of the rows are not those that were checked at the start."""
        if _stamps(self.store) != self._rows:
            raise UserError(
                "the service must be started again: the rows on the disk are not those that it "
                "checked when it started; run: bash scripts/serve.sh"
            )

    # ---- what is accepted and not yet answered, on disk

    def _write_down(self, name: str, asked: BaseModel) -> None:
        make_folder(self.folder / ASKED)
        write_json(self._slip(name), asked.model_dump(exclude_none=True))

    def _strike_out(self, name: str) -> None:
        try:
            with disk_errors(self._slip(name)):
                self._slip(name).unlink(missing_ok=True)
        except UserError as error:  # it will be answered once more
            log(f"warning: {error}")

    def _slip(self, name: str) -> Path:
        return self.folder / ASKED / f"{name}.json"

    def resume(self) -> int:
        """Take up what an ended service had accepted; returns how many questions.

        Those of another model, other pictures or settings are left for a service of theirs.
        """
        taken = 0
        for slip in sorted((self.folder / ASKED).glob("*.json"), key=_modified):
            try:
                asked = self.question(**read_json(slip, remove_hint(slip, "ask again")))
                settings = self.read(asked)
            except (UserError, InvalidQuery, ValidationError, TypeError) as error:
                log(f"warning: {slip} is passed over ({_sentence(error)})")
                continue
            if self.name_of(settings) == slip.stem:
                self.ask(settings, asked, resumed=True)
                taken += 1
            else:
                log(f"{slip} was asked of a service with other settings and is left for it")
        return taken

    def stop(self) -> None:
        """Take no more questions; those accepted are answered."""
        with self._lock:
            self.stopping = True
        self._worker.shutdown(wait=False)

    def close(self) -> None:
        """Wait until all that was accepted is answered."""
        self.stop()
        self._worker.shutdown(wait=True)


def _stamps(store: Store) -> list[tuple[str, int, int, int]]:
    """(name, size, time of the last change, inode) of the files of the rows that are there."""
    found = []
    for path in sorted((*store.folder.glob("train_*-*.*"), store.folder / "manifest.json")):
        with contextlib.suppress(OSError):
            told = path.stat()
            found.append((path.name, told.st_size, told.st_mtime_ns, told.st_ino))
    return found


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # struck out meanwhile by another service
        return 0.0


def _sentence(error: BaseException) -> str:
    """What to tell who asked: one line of bounded length, without a traceback."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "the service has too little memory for this question; see its log"
    if isinstance(error, UserError | InvalidQuery):
        text = " ".join(str(error).split())
        return text if len(text) <= 1000 else f"{text[:1000]} ..."
    return f"the service met a fault of its own ({type(error).__name__}); see its log"


def job_status(job: Job, queue: JobQueue) -> dict[str, Any]:
    """What is said of a question that is not answered yet."""
    before = queue.before(job.name)
    return {
        "id": job.name,
        "status": "queued" if before else "being answered",
        "before": before,
        "seconds": round(time.monotonic() - job.since, 1),
        "answer": f"/answers/{job.name}",
    }
