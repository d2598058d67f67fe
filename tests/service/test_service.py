"""Questions over HTTP: the answers of the command line, each made once; a bounded queue; a sentence
for every mistake; nothing that was accepted is lost.
"""

import asyncio
import base64
import contextlib
import csv
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small_run

pytest.importorskip("fastapi", reason="no fastapi: pip install -e .[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="no uvicorn: pip install -e .[serve]")
pytest.importorskip("prometheus_client", reason="no prometheus_client: pip install -e .[serve]")
testclient = pytest.importorskip(
    "starlette.testclient", reason="no httpx: pip install -e .[test]", exc_type=(ImportError)
)

from concept_trak import cli  # noqa: E402
from concept_trak.attribution.naming import answer_folder  # noqa: E402
from concept_trak.attribution.task import AttributionTask  # noqa: E402
from concept_trak.datasets.image_folder import ImageCaptionDataset  # noqa: E402
from concept_trak.errors import UserError  # noqa: E402
from concept_trak.process import ended_by_sigterm  # noqa: E402
from concept_trak.service import job_queue as queues  # noqa: E402
from concept_trak.service import server as command  # noqa: E402
from concept_trak.service.app import concepts_of, make_app  # noqa: E402
from concept_trak.service.job_queue import JobQueue  # noqa: E402
from concept_trak.service.metrics import Metrics  # noqa: E402
from concept_trak.service.middleware import AuthMiddleware, RequestLimits, validate_token  # noqa: E402
from concept_trak.service.request_schema import FIELD_LIMITS, REQUEST_FIELDS  # noqa: E402
from concept_trak.service.response_schema import AnswerResponse, StatusResponse  # noqa: E402
from concept_trak.settings import Settings, resolve  # noqa: E402
from experiments.scale import service_load  # noqa: E402

ASKED = {"prompt": "a cat in the style of blob", "concepts": ["cat", "blob"]}
HERE = "http://127.0.0.1"
LIMITS = RequestLimits("", 2**16, 5.0)


@pytest.fixture(scope="module")
def flags(tiny_pipeline, tiny_data, tmp_path_factory):
    """{name: value} of a small service whose train gradients exist."""
    given = small_run(tiny_pipeline, tiny_data, tmp_path_factory.mktemp("served"))
    given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    assert run("train-grad", given) == 0
    return given


@pytest.fixture(scope="module")
def task(flags):
    return AttributionTask(resolve("emoji", flags), "cpu")


def run(verb, flags, **changes):
    given = {**flags, **changes}
    return cli.main([verb, *(f"--{k.replace('_', '-')}={v}" for k, v in given.items())])


class Served:
    """A service in this process, its answers in a folder of its own."""

    def __init__(self, task, folder, limits=LIMITS, **settings):
        given = {"results_dir": str(folder), "queue_length": 2, **settings}
        self.counts = Metrics()
        self.queue = JobQueue(task.with_settings(task.settings.but(**given)), self.counts.answered)
        self.app = make_app(self.queue, limits, self.counts)
        self.client = testclient.TestClient(self.app, HERE, raise_server_exceptions=False)

    def ask(self, asked=ASKED, **params):
        return self.client.post("/answers", json=asked, params=params)

    def folder(self, told):
        return self.queue.folder / told.json()["id"]


@pytest.fixture
def served(task, tmp_path):
    made = Served(task, tmp_path / "results")
    yield made
    made.queue.close()


@pytest.fixture(scope="module")
def shared(task, tmp_path_factory):
    """A service of which no test changes more than that it has some answers."""
    made = Served(task, tmp_path_factory.mktemp("shared"), queue_length=9)
    assert made.ask().status_code == 200
    yield made
    made.queue.close()


@pytest.fixture
def gate(monkeypatch):
    """The worker waits until the gate opens; `asked` holds the prompts that it was given."""
    opened, asked, own = threading.Event(), [], queues.attribute

    def waiting(task, store):
        asked.append(task.settings.prompt)
        assert opened.wait(30)
        return own(task, store)

    monkeypatch.setattr(queues, "attribute", waiting)
    yield SimpleNamespace(open=opened.set, asked=asked)
    opened.set()


def about(name, style="blob"):
    return {"prompt": f"a {name} in the style of {style}", "concepts": [name]}


# ---- answers


def test_an_answer_is_that_of_the_command_line(served, flags, tmp_path):
    told = served.ask()
    assert told.status_code == 200
    given = {"prompt": ASKED["prompt"], "target_concepts": "cat,blob"}
    assert run("attribute", flags, results_dir=tmp_path / "line", **given) == 0
    (theirs,) = (tmp_path / "line/free_query").glob("a-cat*")
    ours = served.folder(told)
    assert ours.name == theirs.name
    files = sorted(p.relative_to(theirs) for p in theirs.glob("target_*/*"))
    same = [p for p in files if p.name not in ("metrics.json", "query_meta.json")]
    assert len(same) > 20
    assert [p for p in same if (ours / p).read_bytes() != (theirs / p).read_bytes()] == []
    for concept, words in zip(told.json()["concepts"], ASKED["concepts"], strict=True):
        table = (theirs / f"target_{words}/topk-prompts-lambda_1.0e+01.txt").read_text()
        rows = [line.split("\t") for line in table.splitlines()[1:]]
        assert [card["index"] for card in concept["top"]] == [int(row[2]) for row in rows]
        assert [f"{card['score']:.6e}" for card in concept["top"]] == [row[4] for row in rows]
        with open(theirs / f"target_{words}/scores.csv") as file:
            known = {int(row["index"]): row for row in csv.DictReader(file)}
        scores = np.load(theirs / f"target_{words}/scores.npy")[5]
        assert [c["index"] for c in concept["least"]] == np.argsort(scores, kind="stable")[
            :3
        ].tolist()
        for card in concept["top"] + concept["least"]:
            row = known[card["index"]]
            assert card["caption"] == row["caption"] and card["file_name"] == row["file_name"]
            assert card["match"] == (row["match"] == "1") and f"{card['fit']:.3f}" == row["fit"]


def test_an_answer_has_the_form_that_is_described(shared):
    told = shared.ask(ASKED | {"top_k": 2, "seed": 3, "thumbnails": "data"}).json()
    AnswerResponse.model_validate(told)
    assert told["settings"]["seed"] == 3 and told["settings"]["top_k"] == 2
    assert told["provenance"]["versions"]["torch"]
    (card, _), least = told["concepts"][0]["top"], told["concepts"][1]["least"]
    assert card["thumbnail"].startswith("data:image/webp;base64,") and len(least) == 2
    schema = shared.client.get("/openapi.json").json()
    assert set(REQUEST_FIELDS) < set(schema["components"]["schemas"]["Question"]["properties"])
    for kind in ("png", "npy", "csv"):
        path = told["picture"] if kind == "png" else told["concepts"][0]["files"][kind]
        assert shared.client.get(path).content


def test_an_answer_that_is_there_is_not_made_again(served, flags, monkeypatch):
    given = {"prompt": ASKED["prompt"], "target_concepts": "cat,blob"}
    assert run("attribute", flags, results_dir=served.queue.folder.parent, **given) == 0
    monkeypatch.setattr(queues, "attribute", lambda *_: pytest.fail("made again"))
    first = served.ask()
    assert first.status_code == 200 and first.json() == served.ask().json()
    assert served.client.get(f"/answers/{first.json()['id']}").json() == first.json()
    assert 'concept_trak_questions_total{outcome="known"} 2.0' in served.counts.text().decode()


def test_an_answer_of_other_code_is_made_again(served, gate):
    gate.open()
    folder = served.folder(served.ask())
    for path in folder.glob("target_*/metrics.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"provenance": {"git": "another"}}))
    assert served.ask().status_code == 200 and len(gate.asked) == 2
    assert served.ask().status_code == 200 and len(gate.asked) == 2


def test_who_asks_the_same_at_once_shares_one_answer(served, gate):
    found = []
    threads = [threading.Thread(target=lambda: found.append(served.ask())) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while not gate.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.open()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in found] == [200] * 4 and len(gate.asked) == 1
    assert len({answer.text for answer in found}) == 1


def test_where_a_question_is_asked_is_no_part_of_its_answer(task, tmp_path):
    kept = []
    for port in (8001, 8002):
        served = Served(task, tmp_path / "results", listen_port=port, queue_length=port)
        kept.append(served.queue.task.settings)
        served.queue.close()
    assert kept[0] == kept[1] and kept[0].service == Settings().service
    with_comma, with_bar = (kept[0].but(target_concepts=text) for text in ("a, b", "a|b"))
    assert answer_folder(with_comma, "x") == answer_folder(with_bar, "x")


# ---- the queue


def test_a_full_queue_turns_away_and_says_when_to_come_again(served, gate):
    accepted = [served.ask(about(name), wait=0) for name in ("cat", "dog", "tree")]
    assert [answer.status_code for answer in accepted] == [202] * 3
    told = [answer.json() for answer in accepted]
    for status in told:
        StatusResponse.model_validate(status)
    assert [status["before"] for status in told] == [0, 1, 2]
    refused = served.ask(about("cat", "line"))
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert "queue is full" in refused.json()["error"]
    assert served.ask(about("dog"), wait=0).status_code == 202  # the same one takes no place
    page = served.client.get(f"{told[2]['answer']}/report.html")
    assert (
        page.status_code == 202 and 'http-equiv="refresh"' in page.text and "2 before" in page.text
    )
    assert "unanswered_questions 3.0" in served.client.get("/metrics").text
    gate.open()
    for status in told:
        answer = served.client.get(status["answer"], params={"wait": 30})
        assert answer.status_code == 200 and answer.json()["id"] == status["id"]
    assert served.ask(about("cat", "line")).status_code == 200


def test_a_stopping_service_answers_what_it_accepted_and_takes_no_more(served, gate):
    accepted = [served.ask(about(name), wait=0).json() for name in ("cat", "dog")]
    served.queue.stop()
    refused = served.ask(about("tree"))
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert served.client.get("/health").status_code == 503
    gate.open()
    served.queue.close()
    for status in accepted:
        assert served.client.get(status["answer"]).status_code == 200
    assert list((served.queue.folder / queues.ASKED).iterdir()) == []


def test_what_an_ended_service_accepted_is_answered_by_the_next(task, tmp_path, gate, capfd):
    before = Served(task, tmp_path / "results")
    accepted = [before.ask(about(n) | {"seed": 5}, wait=0).json() for n in ("cat", "dog")]
    slips = before.queue.folder / queues.ASKED
    (slips / "no-question.json").write_text("{")
    kept = {slip.name: slip.read_bytes() for slip in slips.iterdir()}  # as kill -9 leaves them
    gate.open()
    before.queue.close()
    for status in accepted:
        for path in (before.queue.folder / status["id"]).rglob("metrics.json"):
            path.unlink()
    for name, content in kept.items():
        (slips / name).write_bytes(content)
    other = Served(task, tmp_path / "results", nfe=3, gen_guidance_scale=2.0)
    assert other.queue.resume() == 0 and "left for it" in capfd.readouterr().out
    after = Served(task, tmp_path / "results")
    assert after.queue.resume() == 2 and "no-question" in capfd.readouterr().out
    for status in accepted:
        answer = after.client.get(status["answer"], params={"wait": 30})
        assert answer.status_code == 200 and answer.json()["settings"]["seed"] == 5
    after.queue.close(), other.queue.close()
    assert [slip.name for slip in slips.iterdir()] == ["no-question.json"]


def test_a_question_that_cannot_be_written_down_is_not_accepted(served, gate, full_disk):
    told = served.ask()
    assert told.status_code == 500 and "disk is full" in told.json()["error"]
    assert served.queue.unanswered == 0 and gate.asked == []


def test_a_fault_is_one_sentence_and_the_next_question_is_answered(served, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(queues, "attribute", lambda *_: 1 / 0)
        told = served.ask()
        assert told.status_code == 500
        assert told.json() == {
            "error": "the service met a fault of its own (ZeroDivisionError); see its log"
        }
        name = served.queue.name_of(served.queue.read(served.queue.question(**ASKED)))
        assert served.client.get(f"/answers/{name}").status_code == 500
    assert served.ask().status_code == 200
    assert served.client.get(f"/answers/{name}").status_code == 200


# ---- mistakes


def one_sentence(answer):
    """The sentence of a 4xx."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    told = answer.json()
    assert list(told) == ["error"] and told["error"] == " ".join(told["error"].split())
    assert 5 < len(told["error"]) < 1200 and "Traceback" not in told["error"]
    return told["error"]


TEXTS = ("", " ", "cat", "zebra", "a cat in the style of blub", "x" * 2000, "\0", "🙂", "|", "a|b")
ODD = (None, True, -1, 0, 2**80, 1.5, -1e308, [], {}, [[]], *TEXTS)
RAW = (
    *(b"", b"{", b"\xff\xfe", b'{"prompt": "\\ud800", "concepts": ["cat"]}', b"[" * 5000),
    *(b'{"prompt": NaN}', b"1" * 5000, b"x" * 70_000, b"null", b'"text"'),
)


def malformed(rng):
    """Keyword arguments of a request that no service may take."""
    kind = rng.randrange(4)
    if kind == 0:
        content = rng.choice(RAW)
        return {"content": content, "headers": {"Content-Type": rng.choice(TYPES)}}
    asked = dict(ASKED)
    if kind == 1:  # a field less
        del asked[rng.choice(list(asked))]
    elif kind == 2:  # a field that there is not
        asked[rng.choice(("promt", "results_dir", "sd_model_path", "x" * 300))] = rng.choice(ODD)
    else:  # a value that does not fit
        name, fitting = rng.choice(FITTING)
        odd = [value for value in ODD if not fitting(value)]
        asked[name] = rng.choice(odd)
    return {"content": json.dumps(asked), "headers": {"Content-Type": "application/json"}}


TYPES = ("application/json", "text/plain", "application/x-www-form-urlencoded", "")


def number(low, high, kind):
    return lambda v: v is None or (type(v) in kind and low <= v <= high)


FITTING = [
    ("prompt", lambda v: False),
    ("concepts", lambda v: False),
    ("seed", number(0, 2**63 - 1, (int,))),
    ("top_k", number(1, 100, (int,))),
    ("epochs", number(1, 64, (int,))),
    ("gen_num_inference_steps", number(2, 250, (int,))),
    ("eta", number(0, 1, (int, float))),
    ("damping", lambda v: v is None),
    ("gen_guidance_scale", number(-1000, 1000, (int, float))),
    ("query_form", lambda v: v is None),
    ("scope", lambda v: v is None),
    ("thumbnails", lambda v: False),
    (
        "negative_prompt",
        lambda v: v is None or (type(v) is str and len(v) <= 1000 and "\0" not in v),
    ),
    ("negative_prompts", lambda v: v is None),
]


def test_a_hundred_malformed_requests_each_get_one_sentence(shared, gate):
    rng, sentences = random.Random(0), set()
    for _ in range(100):
        request = malformed(rng)
        answer = shared.client.post("/answers", **request)
        try:
            sentences.add(one_sentence(answer))
        except AssertionError:
            pytest.fail(f"{request}: {answer.status_code} {answer.text[:300]}")
    assert len(sentences) > 15  # they say what is wrong with each
    assert gate.asked == [] and shared.queue.unanswered == 0


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"concepts": ["zebra"]}, "'zebra' is not in the prompt"),
        ({"prompt": "a cat in the style of blub", "concepts": ["cat"]}, "'blub'"),
        ({"concepts": ["cat", "Cat"]}, "the same"),
        ({"concepts": ["cat|blob"]}, "no '|'"),
        ({"concepts": ["cat, blob"]}, "','"),
        ({"negative_prompts": ["a"]}, "1 items for 2 concepts"),
        ({"negative_prompts": ["a|b", "c"]}, "no '|'"),
        ({"damping": 0.5}, "one of the sweep"),
        ({"epochs": FIELD_LIMITS["epochs"] + 1}, "'epochs'"),
        ({"prompt": "a cat " + "very " * 30 + "flat", "concepts": ["flat"]}, "is cut off"),
    ],
)
def test_words_and_values_that_do_not_fit_are_told(changes, words, shared):
    assert words in one_sentence(shared.ask(ASKED | changes))


def test_addresses_that_lead_nowhere_are_told(shared):
    name = shared.ask().json()["id"]
    for path in (
        "/nothing",
        "/answers/none",
        f"/answers/{name}/none",
        "/pictures/99",
        "/pictures/x",
    ):
        assert shared.client.get(path).status_code == 404 and one_sentence(shared.client.get(path))
    for out in ("../../x", "..%2F..%2Fx", "%2Fetc%2Fpasswd", "target_cat", "a%00b"):
        assert shared.client.get(f"/answers/{name}/{out}").status_code == 404
    for out in (".asked", ".rows", "%2E%2E%2Fx", "x" * 400, "a%00b", "-1", "1-2", "٣"):
        assert shared.client.get(f"/answers/{out}").status_code == 404
        assert shared.client.get(f"/pictures/{out}").status_code == 404
    assert one_sentence(shared.client.delete("/answers")).startswith("DELETE")
    for path in ("/redoc", "/docs/oauth2-redirect"):  # pages that load scripts from elsewhere
        assert shared.client.get(path).status_code == 404


@pytest.fixture
def own(flags, tiny_data, tmp_path):
    """A service of pictures and rows that a test may change; (service, folder of pictures)."""
    for name in ("data", "grads"):
        shutil.copytree(tiny_data if name == "data" else flags["grad_dir"], tmp_path / name)
    places = {"data_dir": str(tmp_path / "data"), "grad_dir": str(tmp_path / "grads")}
    made = Served(AttributionTask(resolve("emoji", flags | places), "cpu"), tmp_path / "results")
    yield made, tmp_path / "data"
    made.queue.close()


def test_a_picture_or_file_that_leads_elsewhere_by_now_is_gone(own, tmp_path):
    served, data = own
    secret = tmp_path / "secret.png"
    secret.write_text("root:x:0:0")
    pictures = [data / r["file_name"] for r in served.queue.task.train.records]
    kept = [path.read_bytes() for path in pictures]
    assert served.client.get("/pictures/0").content == kept[0]
    ranged = served.client.get("/pictures/0", headers={"Range": "bytes=2-5"})
    assert ranged.status_code == 206 and ranged.content == kept[0][2:6]
    pictures[0].unlink(), pictures[0].symlink_to(secret)
    pictures[1].unlink(), pictures[1].symlink_to(pictures[2])  # another picture
    pictures[3].unlink()
    pictures[4].unlink(), pictures[4].mkdir()
    pictures[5].unlink(), os.mkfifo(pictures[5])
    pictures[6].unlink(), pictures[6].symlink_to(pictures[6].name)  # a loop
    for row in (0, 1, 3, 4, 5, 6):
        for kind in ("pictures", "thumbnails"):
            told = served.client.get(f"/{kind}/{row}")
            assert told.status_code == 410 and "not there any more" in one_sentence(told)
    assert served.client.get("/pictures/2").content == kept[2]
    (tmp_path / "other").mkdir()  # the folder itself becomes a link
    (tmp_path / "other" / pictures[2].name).write_text("root:x:0:0")
    pictures[2].parent.rename(tmp_path / "aside")
    pictures[2].parent.symlink_to(tmp_path / "other")
    assert served.client.get("/pictures/2").status_code == 410


def test_no_file_of_an_answer_leads_out_of_the_answers(served, tmp_path):
    name = served.ask().json()["id"]
    folder = served.queue.folder / name
    (tmp_path / "secret").write_text("root:x:0:0")
    (folder / "scores.csv").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "pipe").unlink(missing_ok=True), os.mkfifo(folder / "pipe")
    (served.queue.folder / "outside").symlink_to(tmp_path)
    (tmp_path / "report.html").write_text("root:x:0:0")
    for path in (f"{name}/scores.csv", f"{name}/up/secret", f"{name}/pipe", "outside/report.html"):
        told = served.client.get(f"/answers/{path}")
        assert told.status_code == 404 and "root:" not in one_sentence(told)
    index = served.queue.folder / "index.html"
    index.unlink(), index.symlink_to(tmp_path / "secret")
    told = served.client.get("/answers/index.html")
    assert told.status_code in (404, 410, 500) and "root:" not in told.text
    assert served.client.get(f"/answers/{name}/report.html").status_code == 200


def exchanged(rows):
    """Ways in which the rows may become others while a service runs."""
    mapped = np.load(rows, mmap_mode="r+")
    mapped[:] = mapped[::-1].copy()
    mapped.flush()


@pytest.mark.parametrize(
    "change",
    [
        exchanged,
        lambda rows: rows.unlink(),
        lambda rows: rows.write_bytes(rows.read_bytes()[:-1]),
        lambda rows: (
            shutil.copy(rows, rows.with_suffix(".x")),
            rows.with_suffix(".x").rename(rows),
        ),
        lambda rows: rows.with_suffix(".json").write_text("{}"),
    ],
)
def test_rows_that_were_exchanged_since_are_told_and_answer_nothing(change, own):
    served, _ = own
    (rows,) = served.queue.store.folder.glob("train_grad-0.npy")
    first = served.ask()
    assert first.status_code == 200
    change(rows)
    told = served.ask(ASKED | {"seed": 5})
    assert told.status_code == 500 and "the service must be started again" in told.json()["error"]
    assert len(list(served.queue.folder.glob("a-cat*"))) == 1
    assert served.ask().json() == first.json()  # that was made of the rows of the start


def test_an_answer_whose_rows_are_exchanged_while_it_is_made_is_not_kept(own, monkeypatch):
    served, _ = own
    (rows,) = served.queue.store.folder.glob("train_grad-0.npy")
    made = queues.attribute

    def late(*asked):
        exchanged(rows)
        return made(*asked)

    monkeypatch.setattr(queues, "attribute", late)
    assert served.ask().status_code == 500
    assert not list(served.queue.folder.glob("a-cat*"))


ODD_LETTERS = ("\x1b", "\x07", "\0", "\x7f", "\x9b", "\ud800", "\udfff")


@pytest.mark.parametrize("letter", ODD_LETTERS, ids=ascii)
def test_what_is_no_text_is_refused_in_a_line_of_text(letter, shared):
    asked = [{name: f"a cat {letter}"} for name in ("prompt", "negative_prompt", "thumbnails")]
    asked += [{"concepts": [f"cat{letter}"]}, {"negative_prompts": [letter, ""]}, {letter: 1}]
    for changes in asked:
        content = json.dumps(ASKED | changes)
        told = shared.client.post(
            "/answers", content=content, headers={"Content-Type": "application/json"}
        )
        assert told.status_code == 422, (changes, told.text)
        assert one_sentence(told).isprintable()
    quoted = urllib.parse.quote(letter, errors="surrogatepass")
    for path in (f"/answers/{quoted}", f"/answers/x/{quoted}", f"/pictures/{quoted}", f"/{quoted}"):
        assert one_sentence(shared.client.get(path)).isprintable()
    told = shared.client.post("/ask", content=f"prompt=a+cat+{quoted}&concepts=cat")
    assert told.status_code == 422


def test_no_refusal_tells_a_folder_or_a_command_of_this_machine(own, monkeypatch, tmp_path):
    served, data = own
    folders = [str(data), str(served.queue.folder), os.getcwd(), "scripts/", "_DIR="]
    monkeypatch.chdir(tmp_path)  # where the path of a script is another
    refused = [served.ask(about(*words)) for words in (("zebra",), ("cat", "blub"))]
    assert [told.status_code for told in refused] == [422, 422]
    assert "unknown concept 'zebra'" in refused[0].json()["error"]
    page = served.client.post("/ask", data={"prompt": "a zebra in the style of blob"})
    form = served.client.post("/ask", data={"prompt": "a zebra", "concepts": "zebra"})
    for error in (
        UserError(f"{data}/metadata.jsonl is missing; make it again: rm {data}/x"),
        UserError(f"cannot write {served.queue.folder}/a: the disk is full; make room"),
        UserError("/root/.cache/x is damaged; remove it and run the same again: rm /root/.cache/x"),
        OSError(2, "No such file or directory", str(data / "a.png")),
    ):

        def failing(*_, error=error):
            raise error

        monkeypatch.setattr(queues, "attribute", failing)
        refused.append(served.ask())
        assert refused[-1].status_code == 500
    for told in (*refused, page, form):
        assert [f for f in (*folders, "/root", "/tmp") if f in told.text] == [], told.text


# ---- who may ask


def test_a_token_is_wanted_of_all_but_health(task, tmp_path):
    token = "0123456789abcdef"
    served = Served(task, tmp_path, RequestLimits(token, 2**16, 5.0))
    get = served.client.get
    assert get("/health").status_code == 200
    for path in (
        "/",
        "/concepts",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/answers/x",
        "/pictures/0",
    ):
        refused = get(path)
        assert refused.status_code == 401 and "API_TOKEN" in one_sentence(refused)
        assert refused.headers["www-authenticate"].startswith("Basic")
    basic = base64.b64encode(f"me:{token}".encode()).decode()
    for right in (f"Bearer {token}", f"bearer {token}", f"Basic {basic}"):
        assert get("/concepts", headers={"Authorization": right}).status_code == 200
    wrong = base64.b64encode(f"{token}:".encode()).decode()
    for bad in ("Bearer", f"Bearer {token}x", token, "Basic x", f"Basic {wrong}", "Bearer \xe9"):
        answer = get("/concepts", headers={"Authorization": bad.encode("latin-1")})
        assert answer.status_code == 401
    served.queue.close()


def test_a_token_that_cannot_guard_is_refused():
    for host in ("127.0.0.1", "::1", "[::1]", "localhost"):
        assert validate_token("", host) == ""
    for token, host, words in (
        ("", "0.0.0.0", "API_TOKEN is not set"),
        ("", "example.org", "API_TOKEN is not set"),
        ("short", "127.0.0.1", "soon guessed"),
        ("a b c d e f g h i j", "127.0.0.1", "no letter of a header"),
    ):
        with pytest.raises(UserError, match=words):
            validate_token(token, host)


def test_a_page_of_another_site_may_not_ask(shared):
    refused = shared.client.get("/concepts", headers={"Host": "evil.example"})
    assert refused.status_code == 421 and one_sentence(refused)
    assert shared.client.get("/concepts", headers={"Host": "[::1"}).status_code == 421
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example", "http://["):
        refused = shared.client.post("/answers", json=ASKED, headers={"Origin": origin})
        assert refused.status_code == 403 and one_sentence(refused)
    assert shared.client.get("/concepts", headers={"Origin": HERE}).status_code == 200
    answer = shared.client.get("/concepts")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def through_guard(messages, headers=()):
    """(status, the body that reaches the application) of a request in these messages."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        if not messages:
            await asyncio.sleep(30)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/answers", "headers": [(b"host", b"localhost"), *headers]}
    asyncio.run(AuthMiddleware(app, RequestLimits("", 1000, 0.2), Metrics())(scope, receive, send))
    return sent[0]["status"], (seen or [None])[0]


def test_a_body_is_read_up_to_a_size_and_a_time():
    chunked, half = (
        [(b"transfer-encoding", b"chunked")],
        {"type": "http.request", "body": b"x" * 500},
    )
    last = {"type": "http.request", "body": b"y", "more_body": False}
    more = half | {"more_body": True}
    assert through_guard([more, last], chunked) == (200, b"x" * 500 + b"y")
    assert through_guard([more, more, more, last], chunked) == (413, None)
    assert through_guard([], [(b"content-length", b"1001")]) == (413, None)
    begun = time.monotonic()
    assert through_guard([more], chunked) == (408, None)
    assert time.monotonic() - begun < 5


# ---- pages


def outside(html):
    """Addresses on a page that a browser would fetch, or follow, elsewhere."""
    found = re.findall(r"""(?:src|href|action|url\()\s*=?\s*["']?([^"'\s>)]+)""", html)
    return [a for a in found if not a.startswith(("/", "#", "data:")) and ":" in a]


def test_the_pages_hold_no_script_and_no_address_elsewhere(shared):
    told = shared.ask().json()
    for path in ("/", "/docs", told["report"], "/answers/index.html", "/nothing"):
        answer = shared.client.get(path, headers={"Accept": "text/html"})
        assert answer.headers["content-type"].startswith("text/html"), path
        assert "<script" not in answer.text and outside(answer.text) == [], path
    docs = shared.client.get("/docs").text
    for name in ("prompt", "concepts", *REQUEST_FIELDS):
        assert f"<code>{name}</code>" in docs
    assert "curl -s http://127.0.0.1/answers" in docs


def test_a_report_leads_to_the_training_pictures_and_back(shared, tiny_data):
    told = shared.ask().json()
    page = shared.client.get(told["report"]).text
    cards = [c for concept in told["concepts"] for c in concept["top"] + concept["least"]]
    assert all(f'<a href="{card["picture"]}">' in page for card in cards)
    assert '<a href="/">Ask another</a>' in page and "../" not in page
    for card in cards[:2]:
        picture = shared.client.get(card["picture"])
        assert picture.content == (tiny_data / card["file_name"]).read_bytes()
        assert picture.headers["content-type"] == "image/png"
        assert shared.client.get(card["thumbnail"]).content.startswith(b"\x89PNG")


def test_the_form_leads_to_the_report_or_says_why_not(shared):
    form = {"prompt": ASKED["prompt"], "concepts": "cat|blob", "seed": "2", "eta": "", "scope": ""}
    done = shared.client.post("/ask", data=form, follow_redirects=False)
    assert done.status_code == 303
    name = done.headers["location"].split("/")[2]
    answer = shared.client.get(f"/answers/{name}", params={"wait": 30}).json()
    assert answer["settings"]["seed"] == 2 and len(answer["concepts"]) == 2
    for changes, words in (
        ({"concepts": "cta"}, "did you mean"),
        ({"seed": "many"}, "is no number"),
        ({"seed": "-1"}, "greater than or equal to 0"),
        ({"prompt": "<b>"}, "&lt;b&gt;"),
        ({"prompt": ""}, "field required"),
        ({"nonsense": "1"}, "extra inputs"),
    ):
        refused = shared.client.post("/ask", data=form | changes)
        assert refused.status_code == 422 and words in refused.text
        assert 'role="alert"' in refused.text and "<b>" not in refused.text
    assert shared.client.post("/ask", content=b"&".join([b"a=1"] * 100)).status_code == 422


def test_what_can_be_asked_about_is_told(shared):
    told = shared.client.get("/concepts").json()
    assert told["labelled"] and set(told["kinds"]["style"]) == {"blob", "line", "flat", "soft"}
    assert told["num_images"] == 11 and sum(told["kinds"]["object"].values()) == 11
    assert shared.ask(told["example"]).status_code == 200
    plain = ImageCaptionDataset("x", [{"file_name": str(i)} for i in range(3)], ["a red cat"] * 3)
    task = SimpleNamespace(train=plain, everything=plain, settings=Settings())
    told = concepts_of(SimpleNamespace(task=task))
    assert told["kinds"] == {"word": {"cat": 3, "red": 3}} and told["example"] is None


def test_counts_are_told_in_the_text_format_of_prometheus(served):
    parser = pytest.importorskip("prometheus_client.parser")
    served.ask(), served.ask({"prompt": 1})
    text = served.client.get("/metrics").text
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    requests = {
        (s.labels["path"], s.labels["status"]): s.value
        for s in families["concept_trak_requests"].samples
    }
    assert requests[("/answers", "200")] == 1 and requests[("/answers", "422")] == 1
    assert families["concept_trak_queue_length"].samples[0].value == 2


# ---- a process


def test_a_port_that_is_taken_and_a_package_that_is_missing_are_told(task, monkeypatch):
    with command.listening("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(UserError, match="LISTEN_PORT=0"):
            with command.listening("127.0.0.1", bound.getsockname()[1]):
                pass
    with pytest.raises(UserError, match="LISTEN_HOST"):
        with command.listening("no such host", 0):
            pass
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(UserError, match="pip install"):
        command.serve(task.settings, "cpu")


@pytest.fixture
def process(flags, tmp_path):
    """Starts services of their own; (process, address)."""
    started = []

    def start():
        given = flags | {"results_dir": tmp_path / "results", "listen_port": 0}
        given = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
        log = open(tmp_path / "log", "w+")  # noqa: SIM115
        done = subprocess.Popen(
            [sys.executable, "-m", "concept_trak", "serve", *given], stdout=log, stderr=log
        )
        started.append(done)
        return done, service_load._address(done, Path(log.name))

    yield start
    for each in started:
        each.kill(), each.wait()


def post(address, asked, found):
    request = urllib.request.Request(
        f"{address}/answers", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            found.append((answer.status, json.loads(answer.read())["prompt"]))
    except (OSError, urllib.error.HTTPError) as error:
        found.append((0, repr(error)))


def asking(address, count, folder, found):
    """Threads that wait for answers, all of whose questions were accepted; `found` gets those."""
    slow = {"gen_num_inference_steps": 40}  # so that the signal comes before the last answer
    names = [(name, style) for style in ("line", "flat") for name in ("cat", "dog", "tree")]
    asked = [about(*name) | slow for name in names]
    threads = [threading.Thread(target=post, args=(address, a, found)) for a in asked[:count]]
    for thread in threads:
        thread.start()
    slips, deadline = folder / "free_query" / queues.ASKED, time.monotonic() + 60
    while time.monotonic() < deadline:
        there = len(list(slips.glob("*.json"))) if slips.is_dir() else 0
        if there + len(found) >= count:
            break
        time.sleep(0.005)
    return threads


def test_a_signal_stops_it_after_every_accepted_request_is_answered(task, tmp_path, capfd):
    served, found, garbage = Served(task, tmp_path / "results", queue_length=9), [], []

    def raw(sent):
        with socket.create_connection(bound_at, 60) as via, contextlib.suppress(ConnectionError):
            via.sendall(sent)
            return via.recv(1000)

    def ask_and_end():
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=60).close()
                break
            except OSError:
                time.sleep(0.02)
        garbage.extend(map(raw, (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000)))
        threads = asking(address, 3, tmp_path / "results", found)
        answered = len(found)
        os.kill(os.getpid(), signal.SIGTERM)
        for thread in threads:
            thread.join()
        found.append(answered)

    with command.listening("127.0.0.1", 0) as bound:
        address, bound_at = command.address_of(bound), bound.getsockname()
        helper = threading.Thread(target=ask_and_end)
        helper.start()
        with ended_by_sigterm():
            command.run(served.app, served.queue, bound)
    helper.join()
    assert all(g is None or g.startswith(b"HTTP/1.1 400") for g in garbage) and garbage[0]
    assert found.pop() < 3  # or it would have been no stop in the middle
    assert [status for status, _ in found] == [200] * 3, found
    assert "every accepted question is answered" in capfd.readouterr().out
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/health", timeout=5)


@contextlib.contextmanager
def running(served):
    """A service that listens, in a thread beside this one; (address, what stops it)."""
    kept = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with command.listening("127.0.0.1", 0) as bound:
        bound.listen(command.CONNECTIONS)
        place, servers = bound.getsockname()[:2], []
        own = uvicorn.Server.__init__

        def known(server, config):
            servers.append(server)
            own(server, config)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uvicorn.Server, "__init__", known)
            thread = threading.Thread(target=command.run, args=(served.app, served.queue, bound))
            thread.start()
            while not (servers and servers[0].started):
                time.sleep(0.01)
        try:
            yield place, lambda: setattr(servers[0], "should_exit", True)
        finally:
            servers[0].should_exit = True
            thread.join(60)
    assert not thread.is_alive()
    assert kept == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def status(place, path="/health", method="GET", body=None):
    via = http.client.HTTPConnection(*place, timeout=60)
    with contextlib.closing(via):
        via.request(method, path, body, {"Content-Type": "application/json"})
        return via.getresponse().status


def closed(via):
    """Whether the other end has let go of a connection."""
    via.settimeout(20)
    with contextlib.suppress(ConnectionError):
        while via.recv(2**16):
            pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\n",
    ],
)
def test_half_a_head_holds_nobody(sent, task, tmp_path, monkeypatch):
    """More connections than are taken at a time, none of which asks to the end."""
    monkeypatch.setattr(command, "CONNECTIONS", 20)
    served = Served(task, tmp_path / "results", body_timeout=1.0)
    with running(served) as (place, _), contextlib.ExitStack() as held:
        before = time.monotonic()
        each = [held.enter_context(socket.create_connection(place, 20)) for _ in range(30)]
        for via in each:
            with contextlib.suppress(ConnectionError):  # the first ones are let go by now
                via.sendall(sent)
        assert status(place) == 200 and time.monotonic() - before < 10
        assert all(map(closed, each))


def test_who_asks_slowly_but_to_the_end_is_served(task, tmp_path):
    served = Served(task, tmp_path / "results", body_timeout=2.0)
    with running(served) as (place, _), socket.create_connection(place, 20) as via:
        for _ in range(4):  # on one connection, for longer than one head may take
            for part in (b"GET /health HTTP/1.1\r\n", b"Host: localhost\r\n\r\n"):
                via.sendall(part)
                time.sleep(0.3)
            assert via.recv(2**16).startswith(b"HTTP/1.1 200")


def test_a_stopping_service_listens_until_all_is_answered(task, tmp_path, gate):
    served, found = Served(task, tmp_path / "results", queue_length=9), []
    with running(served) as (place, stop):
        asked = json.dumps(about("cat")).encode()
        assert status(place, "/answers?wait=0", "POST", asked) == 202
        (name,) = (path.stem for path in (served.queue.folder / queues.ASKED).glob("*.json"))
        stop()
        while not served.queue.stopping:
            time.sleep(0.01)
        assert status(place) == 503
        assert status(place, "/answers", "POST", json.dumps(about("dog")).encode()) == 503
        waiting = threading.Thread(target=lambda: found.append(status(place, f"/answers/{name}")))
        waiting.start()  # who was told to come again
        time.sleep(0.3)
        gate.open()
        waiting.join(60)
    assert found == [200]
    with pytest.raises(OSError):
        status(place)


def test_who_reads_the_address_can_connect_at_once(task, tmp_path, monkeypatch, capfd):
    connected = []

    def run(app, queue, bound):
        address = capfd.readouterr().out.split("service: ")[1].strip()
        assert address == command.address_of(bound)
        socket.create_connection(bound.getsockname(), 10).close()
        connected.append(queue.length)
        queue.close()

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(
        command, "AttributionTask", lambda settings, device: task.with_settings(settings)
    )
    given = {"results_dir": str(tmp_path), "listen_port": 0, "queue_length": 7}
    command.serve(task.settings.but(**given), "cpu")
    assert connected == [7]


@pytest.mark.slow
def test_a_killed_service_leaves_its_questions_to_the_next(process, tmp_path):
    service, address = process()
    threads = asking(address, 6, tmp_path / "results", [])
    slips = tmp_path / "results/free_query" / queues.ASKED
    service.kill()
    left = [slip.stem for slip in slips.glob("[!.]*.json")]
    for thread in threads:
        thread.join()
    assert left
    service, address = process()
    for name in left:
        with urllib.request.urlopen(f"{address}/answers/{name}?wait=60", timeout=300) as answer:
            assert answer.status == 200 and json.loads(answer.read())["id"] == name
    service.send_signal(signal.SIGINT)
    assert service.wait(300) == 0 and not list(slips.glob("*.json"))


# ---- the bench


def test_percentiles_are_by_nearest_rank():
    found = service_load.Load([0.001 * i for i in range(200, 0, -1)], [], 1.0)
    assert [found.percentile(p) for p in (5, 50, 95, 100)] == [10.0, 100.0, 190.0, 200.0]
    assert service_load.Load([0.5], [], 1.0).percentile(5) == 500.0


def test_the_bench_asks_different_questions_and_refuses_a_wrong_answer(flags):
    asked = service_load.questions(resolve("emoji", flags), 30)
    assert len({json.dumps(question) for question in asked}) == 30
    right = {
        "prompt": asked[0]["prompt"],
        "concepts": [{"concept": c} for c in asked[0]["concepts"]],
    }
    assert service_load._wrong(asked[0], 200, json.dumps(right).encode()) == ""
    assert "status 429" in service_load._wrong(asked[0], 429, b"full")
    assert "an answer about" in service_load._wrong(asked[0], 200, b'{"prompt": "x"}')


@pytest.mark.slow
def test_the_bench_ends_with_one_line_of_json(flags, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert run("bench-service", flags, clients=3, requests=6) == 0
    out = capfd.readouterr().out.splitlines()
    told = json.loads(out[-1])
    assert told["requests"] == 6 and told["errors"] == 0 and 0 < told["p50_ms"] <= told["p95_ms"]
    assert told["known"]["p50_ms"] < told["p50_ms"] and "p95 ms" in "\n".join(out)
