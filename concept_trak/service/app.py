"""The addresses of the service. Whatever is wrong with a request is one sentence: {"error": ...}.

Annotations are evaluated here: FastAPI reads those that name a model made at run time.
"""

import asyncio
import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from ..datasets import labels
from ..datasets.list_concepts import frequent_words
from ..errors import UserError
from ..report.answers_index import PAGE
from ..report.pictures import EMBED_SIDE, shrunk
from ..report.results import image_bytes
from ..settings import version
from ..validated_io import safe_join
from . import html
from .job_queue import InvalidQuery, Job, JobQueue, QueryFailed, QueueFull, ShuttingDown, job_status
from .metrics import CONTENT_TYPE_LATEST, Metrics
from .middleware import AuthMiddleware, RequestLimits
from .outgoing import MEDIA, Moved, Opened, opened, places, printable, read, without_places
from .response_schema import AnswerResponse, AnswerSerializer, ErrorResponse, StatusResponse

POLL_SECONDS = 1.0  # to wait again while the service stops: the connection is all that is left
ABOUT = """Which training pictures taught a diffusion model a concept? A question is a prompt and
words of it; the answer gives every training picture a score for each concept. A high score:
removing the picture would weaken the concept."""
SAYS: dict[int, tuple[str, type[BaseModel]]] = {
    200: ("the answer", AnswerResponse),
    202: ("accepted; where the answer will be, and how many are before it", StatusResponse),
    401: ("API_TOKEN is set, and was not given", ErrorResponse),
    404: ("there is no such thing", ErrorResponse),
    410: ("the file is not there any more, or is another", ErrorResponse),
    413: ("the body is too large", ErrorResponse),
    422: ("words or values that do not fit", ErrorResponse),
    429: ("the queue is full; Retry-After says when to come again", ErrorResponse),
    500: ("the service could not; its log says more", ErrorResponse),
    503: ("the service is stopping", ErrorResponse),
}


def document_responses(*codes: int) -> Any:
    """What an address may answer, for its description."""
    return {code: {"description": SAYS[code][0], "model": SAYS[code][1]} for code in codes}


FILE = {200: {"description": "the file", "content": {"application/octet-stream": {}}}}
FILE |= document_responses(401, 404, 410, 422)
Tell = Callable[[Any], str]  # a sentence as others may read it


def make_app(queue: JobQueue, limits: RequestLimits, counts: Metrics) -> FastAPI:
    """The application. It owns nothing: whoever made the desk closes it."""
    about: dict[str, Any] = {"title": "concept-trak", "version": version(), "description": ABOUT}
    app = FastAPI(**about, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    counts.watch(lambda: queue.unanswered, queue.length)
    known = places(queue.task.settings)

    def tell(sentence: Any) -> str:
        return printable(without_places(str(sentence), known))

    add_errors(app, tell)
    service = Service(queue, counts)
    add_answers(app, service, tell)
    add_pictures(app, queue)
    add_about(app, queue, counts)
    app.add_middleware(AuthMiddleware, limits=limits, counts=counts)
    return app


class Service:
    """Takes questions for the addresses, and waits for their answers."""

    def __init__(self, queue: JobQueue, counts: Metrics) -> None:
        self.queue, self.counts = queue, counts
        self.serializer = AnswerSerializer(queue.task, queue.store)
        self.links = html.Links(queue.task.train)

    async def accept(self, asked: BaseModel) -> str:
        """The name of the answer, which is there or on its way.

        Raises HTTPException for a question that is refused, or turned away.
        """
        return await run_in_threadpool(self._accept, asked)

    def _accept(self, asked: BaseModel) -> str:
        queue = self.queue
        try:
            settings = queue.read(asked)
            name = queue.name_of(settings)
            if queue.known(name):
                self.counts.answered("known", 0.0)
                return name
            return queue.ask(settings, asked).name
        except InvalidQuery as error:
            self.counts.answered("refused", 0.0)
            raise HTTPException(422, str(error)) from None
        except QueueFull as error:
            self.counts.answered("turned away", 0.0)
            raise HTTPException(429, str(error), {"Retry-After": str(error.after)}) from None
        except ShuttingDown:
            told = "the service is stopping; ask again when it is back"
            raise HTTPException(503, told, {"Retry-After": "30"}) from None

    async def answered(self, name: str, wait: float) -> Job | None:
        """Wait for an answer at most so many seconds; the job if it is still on its way.

        HTTPException for one that could not be made, or of which nothing is known.
        """
        job = self.queue.job(name)
        if job is not None:
            made = asyncio.ensure_future(asyncio.wrap_future(job.made))
            made.add_done_callback(lambda f: f.cancelled() or f.exception())  # told below
            try:
                await asyncio.wait([made], timeout=wait)
                while not made.done() and self.queue.stopping:
                    await asyncio.wait([made], timeout=POLL_SECONDS)
            except asyncio.CancelledError:
                if not self.queue.stopping:
                    raise
                told = "the service was ended at once; it answers when it is back"
                raise HTTPException(503, told) from None
            if not made.done():
                return job
        if (error := self.queue.failure(name)) is not None:
            raise HTTPException(422 if isinstance(error, InvalidQuery) else 500, str(error))
        if not await run_in_threadpool(self.queue.is_there, name):
            raise HTTPException(404, f"there is no answer of the name {name[:300]!r}")
        return None

    async def told(self, name: str, wait: float, thumbnails: str) -> Response:
        """An answer as JSON, or what is known of it so far."""
        job = await self.answered(name, wait)
        if job is not None:
            after = math.ceil(self.queue.tally.mean())
            headers = {"Location": f"/answers/{job.name}", "Retry-After": str(after)}
            return JSONResponse(job_status(job, self.queue), 202, headers)
        told = await run_in_threadpool(self.serializer.told, self.queue.folder / name, thumbnails)
        return JSONResponse(told)


def add_answers(app: FastAPI, service: Service, tell: Tell) -> None:
    """To ask, and to read answers."""
    queue, longest = service.queue, service.queue.wait
    Asked, Wait = service.queue.question, Annotated[float, Query(ge=0, le=longest)]

    @app.post(
        "/answers",
        responses=document_responses(200, 202, 401, 413, 422, 429, 500, 503),
        summary="Ask a question",
    )
    async def ask(
        asked: Annotated[Asked, Body()],  # type: ignore[valid-type]
        wait: Wait = longest,
    ) -> Response:
        """Answers within so many seconds (200), or says where the answer will be (202). The same
        question is answered once: again, it is read from the results folder of the service, which
        it shares with the command line.
        """
        return await service.told(await service.accept(asked), wait, asked.thumbnails)

    @app.get(
        "/answers/{name}",
        responses=document_responses(200, 202, 401, 404, 422, 500),
        summary="Read an answer",
    )
    async def read(name: str, wait: Wait = 0.0, thumbnails: str = "links") -> Response:
        """The answer of that id, waiting for it at most so many seconds. thumbnails: links, data,
        none.
        """
        if name == "index.html":
            return await run_in_threadpool(index_page, queue)
        if thumbnails not in ("links", "data", "none"):
            raise HTTPException(422, "thumbnails must be links, data or none")
        return await service.told(name, wait, thumbnails)

    @app.get("/answers/{name}/{file:path}", responses=FILE, summary="A file of an answer")
    async def read_file(name: str, file: str) -> Response:
        """report.html, scores.csv, scores.npy, ...: the files that the command line writes. While
        the answer is on its way, report.html is a page that looks again by itself.
        """
        job = await service.answered(name, 0.0)
        if job is not None:
            if file != PAGE:
                raise HTTPException(404, "the answer is on its way; its files come with it")
            return HTMLResponse(html.waiting_page(job_status(job, queue)), 202)
        return await run_in_threadpool(file_of, queue.folder, f"{name}/{file}", service.links)

    @app.post("/ask", include_in_schema=False)
    async def ask_by_form(request: Request) -> Response:
        given = html.fields_of(await request.body())
        try:
            asked = queue.question(**html.question_of(given, queue.question))
            name = await service.accept(asked)
        except ValidationError as error:
            said = tell(sentence_of(error.errors()[0]))
            return HTMLResponse(html.form(queue, given, said), 422)
        except UserError as error:
            return HTMLResponse(html.form(queue, given, tell(error)), 422)
        except HTTPException as error:
            page = html.form(queue, given, tell(error.detail))
            return HTMLResponse(page, error.status_code, error.headers)
        return RedirectResponse(f"/answers/{name}/{PAGE}", 303)

    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return HTMLResponse(await run_in_threadpool(html.form, queue, {}, ""))


def index_page(queue: JobQueue) -> Response:
    """The list of all answers."""
    path = queue.folder / "index.html"
    if not path.is_file():
        raise HTTPException(404, "there is no answer yet; ask one")
    return HTMLResponse(read(path, safe_join(queue.folder, path.name, "the file").resolve()))


def file_of(folder: Path, name: str, links: html.Links) -> Response:
    """A file of an answer below the folder of all answers. HTTPException for one that is not
    there.
    """
    try:
        path = safe_join(folder, name, "the file")
        real = path.resolve()
    except (UserError, OSError, RuntimeError):
        path = real = folder
    if not real.is_file() or any(p.startswith(".") for p in Path(name).parts):
        raise HTTPException(404, f"the answer has no file {name.partition('/')[2][:300]!r}")
    if path.name == PAGE:
        return HTMLResponse(html.moved(read(path, real), path.parent, links))
    media = MEDIA.get(path.suffix.lower(), "application/octet-stream")
    return Opened(opened(path, real), media)


def add_pictures(app: FastAPI, queue: JobQueue) -> None:
    """The training pictures."""
    data = queue.task.train
    kept = {"Cache-Control": "private, max-age=3600"}

    def checked(index: str) -> int:
        row = int(index) if re.fullmatch(r"\d{1,12}", index, re.ASCII) else len(data)
        if row >= len(data):
            told = f"there is no training picture {index[:40]!r}; they are 0 to {len(data) - 1}"
            raise HTTPException(404, told)
        return row

    @contextlib.contextmanager
    def found() -> Iterator[None]:
        try:
            yield
        except UserError:
            raise Moved from None

    @app.get("/pictures/{index}", responses=FILE, summary="A training picture")
    def picture(index: str) -> Response:
        """The file as it is."""
        row = checked(index)
        with found(), data.open_file(row) as file:
            return Opened(os.dup(file.fileno()), data.media_type(row), **kept)

    @app.get("/thumbnails/{index}", responses=FILE, summary="A training picture, small")
    def thumbnail(index: str) -> Response:
        """PNG of at most 128 pixels a side."""
        with found():
            small = shrunk(data.image(checked(index)), EMBED_SIDE)
        return Response(image_bytes(small, "PNG"), media_type="image/png", headers=kept)


def add_about(app: FastAPI, queue: JobQueue, counts: Metrics) -> None:
    """What the service knows, whether it lives, what it counts, how it is asked."""

    @app.get(
        "/concepts",
        responses={200: {"description": "what is told"}},
        summary="What can be asked about",
    )
    def concepts() -> dict[str, Any]:
        """The concepts that the labels of the pictures name, with the number of pictures, and an
        example; without labels the most frequent words of the captions.
        """
        return concepts_of(queue)

    @app.get(
        "/health",
        responses={200: {"description": "what is told"}},
        summary="Whether it takes questions",
    )
    def health() -> Response:
        """200 while it does, 503 while it stops; told without API_TOKEN."""
        told = {"status": "stopping" if queue.stopping else "ok"}
        return JSONResponse(told, 503 if queue.stopping else 200)

    @app.get(
        "/metrics",
        responses={200: {"description": "what is told"}},
        summary="Counts for Prometheus",
    )
    def metrics() -> Response:
        """Requests, questions, seconds and memory, in Prometheus' text format."""
        return Response(counts.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        example = {"prompt": "...", "concepts": ["..."]}
        if first := html.example_of(queue):
            example = {"prompt": first[0], "concepts": first[1]}
        call = f"{request.base_url}answers", json.dumps(example, ensure_ascii=False)
        return HTMLResponse(html.docs(app.openapi(), *call))


def concepts_of(queue: JobQueue) -> dict[str, Any]:
    """{labelled, kinds: {kind: {word: pictures}}, example, num_images}."""
    data = queue.task.train
    if labels.has_labels(data):
        kinds = {column: labels.values(data, column) for column in labels.COLUMNS}
        kinds = {column: found for column, found in kinds.items() if found}
        first = html.example_of(queue)
        example = first and {"prompt": first[0], "concepts": first[1]}
    else:
        kinds, example = {"word": frequent_words(data)}, None
    labelled = labels.has_labels(data)
    return {"labelled": labelled, "kinds": kinds, "example": example, "num_images": len(data)}


def sentence_of(error: Any) -> str:
    """What pydantic says of a value, as a sentence that names it."""
    place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
    text = " ".join(str(error["msg"]).split())
    if error["type"] == "json_invalid":
        return "the body is not JSON"
    if error["type"] == "missing" and not place:
        return 'the request has no body; send JSON such as {"prompt": ..., "concepts": [...]}'
    if error["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return "the body must be a JSON object, sent as application/json"
    return f"{place[:200]!r}: {text[:1].lower()}{text[1:]}"[:600]


def add_errors(app: FastAPI, tell: Tell) -> None:
    """Every error as {"error": one sentence}, or as a page for a browser."""

    def said(request: Request, status: int, sentence: Any, headers: Any = None) -> Response:
        sentence = tell(sentence)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(html.error_page(status, sentence), status, headers)
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> Response:
        return said(request, 422, sentence_of(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        sentence = str(error.detail)
        if error.status_code == 404 and sentence == "Not Found":
            sentence = "there is nothing at this address; /docs lists those that there are"
        if error.status_code == 405:
            sentence = f"{request.method} is not for this address; /docs lists what is"
        return said(request, error.status_code, sentence, error.headers)

    @app.exception_handler(UserError)
    async def mended(request: Request, error: UserError) -> Response:
        return said(request, 500, error)

    @app.exception_handler(Moved)
    async def gone(request: Request, error: Moved) -> Response:
        return said(request, 410, "this file is not there any more, or is another than it was")

    @app.exception_handler(QueryFailed)
    async def failed(request: Request, error: QueryFailed) -> Response:
        return said(request, 500, error)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return said(request, 500, "the service met a fault of its own; see its log")
