"""What reaches the terminal: text alone."""

import contextlib
import io
import logging
import sys

from tqdm import tqdm

from concept_trak import cli
from concept_trak.errors import UserError
from concept_trak.process import log, speak_plainly

CLEARS, TITLE, BACK = "\x1b[2J", "\x1b]0;title\x07", "\x08\x08"
KEPT = "caf\u00e9 \u732b \U0001f9d1\u200d\U0001f680 \u05d7\u05ea\u05d5\u05dc\ta\nb"
NASTY = (CLEARS, TITLE, BACK, "\x9b2J", "\x7f", "\u202egnp.tac", "a\rb", "\x00", "\u2066x")


@contextlib.contextmanager
def terminal():
    """What was written to (standard output, standard error), once that is over."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    told = []
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield told
    told += [stream.buffer.getvalue().decode() for stream in streams]


def clean(text):
    return not any(ord(c) < 32 and c not in "\n\t" or ord(c) == 127 for c in text) and not (
        set(text) & {"\x9b", "\u202e", "\u2066"}
    )


def test_whoever_writes_no_control_reaches_the_terminal():
    with terminal() as told:
        speak_plainly()
        for text in NASTY:
            log(f"a {text}")
            print(text, flush=True)
            print(f"error: {text}", file=sys.stderr)
            logging.StreamHandler().emit(logging.makeLogRecord({"msg": text}))
    out, err = told
    assert clean(out) and clean(err)
    assert "a \\x1b[2J" in out and "error: \\x1b]0;title\\x07" in err and "\\u202egnp" in out


def test_text_of_every_script_stays_and_what_is_no_text_ends_nothing():
    with terminal() as told:
        speak_plainly()
        speak_plainly()  # once is enough
        print(KEPT, "\udcff")
    assert told[0] == f"{KEPT} \\udcff\n"


def test_a_bar_moves_the_cursor_and_its_label_does_not():
    seen = {"disable": False, "mininterval": 0}
    with terminal() as told:
        speak_plainly()
        with tqdm(total=2, desc=f"{CLEARS}cat", file=sys.stderr, **seen) as bar:
            with tqdm(total=1, desc="inner", file=sys.stderr, **seen) as inner:
                inner.update()
            bar.update()
    assert "\r\\x1b[2Jcat" in told[1] and "\x1b[A" in told[1] and CLEARS not in told[1]


def test_a_line_of_a_failed_run_is_plain(monkeypatch):
    def fail(_):
        raise UserError(f"{TITLE} is wrong; mend it")

    monkeypatch.setattr("concept_trak.verbs.settings_of", fail)
    with terminal() as told:
        assert cli.main(["concepts"]) == 2
    assert told[1] == "error: \\x1b]0;title\\x07 is wrong; mend it\n"
