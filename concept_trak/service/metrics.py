"""What the service measures of itself, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]


class Metrics:
    """Counters of one service; memory and processor time of its process come with them."""

    def __init__(self) -> None:
        disable_created_metrics()  # a line more for each of them
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        ProcessCollector(**own)
        self.requests = Counter(
            "concept_trak_requests", "Requests by address and status", ("path", "status"), **own
        )
        self.seconds = Histogram(
            "concept_trak_request_seconds",
            "From the first byte of a request to the end of its answer",
            ("path",),
            buckets=SECONDS,
            **own,
        )
        self.questions = Counter(
            "concept_trak_questions", "Questions by what became of them", ("outcome",), **own
        )
        self.answer_seconds = Histogram(
            "concept_trak_answer_seconds", "Work on one question", buckets=SECONDS, **own
        )
        what = "Questions accepted and not yet answered"
        self.unanswered = Gauge("concept_trak_unanswered_questions", what, **own)
        self.length = Gauge("concept_trak_queue_length", "QUEUE_LENGTH", **own)

    def watch(self, unanswered: Callable[[], int], length: int) -> None:
        """Read the number of unanswered questions when it is asked for."""
        self.unanswered.set_function(unanswered)
        self.length.set(length)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request. path: the pattern of its address, of which there are few."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def answered(self, outcome: str, seconds: float) -> None:
        """Count what became of a question: known, answered, refused, failed, turned away."""
        self.questions.labels(outcome).inc()
        if outcome == "answered":
            self.answer_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
