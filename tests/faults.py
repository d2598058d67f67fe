"""The fault table: a finished little project, one thing wrong with it, one run of the program.

What must hold of every case: the exit is 0 or 2 and never a traceback; at 2 there is one line that
begins with "error:"; at 0 after a damaged *file* the result is that of the undamaged one; and no
file of the project but the damaged one (and what that run is there to write) has changed.

    python tests/faults.py [--every N] [--only CLASS]     prints counts by class as JSON
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import disk_faults
import hub_faults
import kills
from spoils import SPOIL, TEXTS, kinds_of

# a legal value of these asks for work without end, or for another machine
LARGE = ("epochs", "gen_num_inference_steps", "gpu_ids", "nfe")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing wrong. kind: its class. spoil: what it does to `file`; a run that succeeds must
    give the same then. within: the context of the run. again: whether the same command, with
    nothing wrong any more, must come to what it would have. known: digests of what the hub has.
    """

    kind: str
    name: str
    verb: str
    flags: dict[str, object]
    spoil: Callable[[Path], None] | None = None
    file: str = ""
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    again: bool = False
    known: frozenset[str] = frozenset()

    def key(self) -> str:
        """Of all cases of the same command."""
        return json.dumps([self.verb, self.flags], default=str, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case came to: ok, or what did not hold."""

    case: Case
    fault: str
    told: str


class Project:
    """A pipeline, pictures, their store, encoded pictures, their store, an answer to each, and its
    page in the explorer.
    """

    def __init__(self, root: Path) -> None:
        from conftest import save_tiny_data, save_tiny_pipeline

        self.root, self.home = root / "project", root
        save_tiny_pipeline(self.root / "pipeline")
        save_tiny_data(self.root / "data")
        self.flags = {
            "sd_model_path": self.root / "pipeline",
            "data_dir": self.root / "data",
            "grad_dir": self.root / "grads",
            "results_dir": self.root / "results",
            "prompt": "a cat in the style of blob",
            "target_concepts": "cat,blob",
            **{"proj_dim": 32, "num_split": 2, "nfe": 3, "gen_num_inference_steps": 4},
            **{"epochs": 2, "batch_size": 4, "top_k": 3, "device": "cpu"},
        }
        encoded = {"data_dir": self.root / "encoded", "grad_dir": self.root / "grads_encoded"}
        self.encoded = self.flags | encoded | {"results_dir": self.root / "results_encoded"}
        source = {"source_dir": self.root / "data"}
        asked = ("prompt", "target_concepts", "results_dir", "epochs", "top_k")
        self.export = {k: v for k, v in self.flags.items() if k not in asked}
        del self.export["num_split"], self.export["gen_num_inference_steps"]
        for verb, flags in (
            ("train-grad", self.flags),
            ("attribute", self.flags),
            ("explore", {"results_dir": self.flags["results_dir"]}),
            ("prepare", self.encoded | source),
            ("train-grad", self.encoded),
            ("attribute", self.encoded),
            ("explore", {"results_dir": self.encoded["results_dir"]}),
        ):
            code, told = call(verb, flags)
            assert code == 0, told
        shutil.copytree(self.root, self.home / "whole", symlinks=True)
        self.clean, self.wanted, self.usual = self.content(), {}, {}
        (self.home / "elsewhere").mkdir()

    def restore(self) -> None:
        """The project as it was built. Few of its files change in a run: only those are copied."""
        whole = self.home / "whole"
        for path in sorted(self.root.rglob("*"), reverse=True):
            if not same_path(whole / path.relative_to(self.root), path):
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        for path in sorted(whole.rglob("*")):
            if not os.path.lexists(here := self.root / path.relative_to(whole)):
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, here, symlinks=True)
                else:
                    shutil.copy2(path, here, follow_symlinks=False)

    def content(self) -> dict[str, str]:
        """{file: digest} of the whole project."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                content = re.sub(rb'"made":"[^"]*"', b"", path.read_bytes())  # when, in a page
                found[str(path.relative_to(self.root))] = hashlib.sha256(content).hexdigest()
        return found

    def run(self, case: Case) -> Outcome:
        """The outcome; the project is restored, and so is where the process stands."""
        here = Path.cwd()
        try:
            if case.kind.startswith("readers"):
                self.usual_of(case)
            if case.spoil:
                case.spoil(self.root / case.file)
            os.chdir(self.home / "elsewhere")
            before, begun = self.content(), time.time()
            try:
                with within_seconds(40), case.within():
                    code, told = call(case.verb, case.flags)
            except BaseException as error:  # noqa: BLE001 - that is what is looked for
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                said = f"{type(error).__name__}: {str(error)[:200]} at {where}"
                return Outcome(case, "traceback", said)
            return Outcome(case, self.fault(case, code, told, before, begun), told)
        finally:
            os.chdir(here)
            self.restore()

    def fault(self, case: Case, code: int, told: str, before: dict[str, str], begun: float) -> str:
        """What did not hold; empty if all did."""
        lines = [line for line in told.splitlines() if line.startswith("error:")]
        if code not in (0, 2):
            return f"exit {code}"
        if code == 2 and (len(lines) != 1 or not told.rstrip().endswith(lines[0])):
            return "not one line"
        if code == 2 and len(lines[0]) > 1500:
            return "endless line"
        if time.time() - begun > 20:
            return "slow"
        after = self.content()
        lost = [f for f in before if f not in after and not f.startswith("results")]
        lost = [f for f in lost if ".part" not in f and not related(f, case.file)]
        if lost:
            return f"lost {lost[0]}"
        if case.spoil and code == 0 and not self.same(after, case):
            return "silent change"
        if outside := [f.name for f in self.home.iterdir() if f.name not in HOME]:
            for name in outside:
                (self.home / name).unlink()
            return f"outside: {outside[0]}"
        if code == 0 and self.strange(after, case.known):
            return "silent change"
        return self.fault_of_next(case) if case.again else ""

    def strange(self, after: dict[str, str], known: frozenset[str]) -> list[str]:
        """Files of a download whose content the hub does not have."""
        new = [f for f in after if f.startswith("fetched") and ".download" not in f]
        new = [f for f in new if not re.search(r"manifest\.json|train_grad-\d+\.json", f)]
        return [f for f in new if after[f] not in known]

    def fault_of_next(self, case: Case) -> str:
        """What does not hold of the same command when nothing is wrong any more."""
        code, told = call(case.verb, case.flags)
        if code:
            return f"no way on: {told.strip()[-200:]}"
        wanted = self.wanted.setdefault(case.verb, said(self.content()))
        return "" if said(self.content()) == wanted else "silent change by the next"

    def same(self, after: dict[str, str], case: Case) -> bool:
        """Whether no ranking, picture, row or page is there that the clean project does not have,
        or get by the same command.
        """
        if case.kind.startswith("readers"):  # what the verb leaves as it found it is not its doing
            after = {f: digest for f, digest in after.items() if f != case.file}
        return said(after) <= said(self.clean) | self.usual.get(case.key(), set())

    def usual_of(self, case: Case) -> set[tuple[str, str]]:
        """What the command of the case comes to when nothing is wrong; found out once."""
        if case.key() not in self.usual:
            code, told = call(case.verb, case.flags)
            assert code == 0, told
            self.usual[case.key()] = said(self.content())
            self.restore()
        return self.usual[case.key()]


def same_path(one: Path, other: Path) -> bool:
    """Whether both are folders, the same link, or files of one content and one time."""
    if not os.path.lexists(one) or one.lstat().st_mode != other.lstat().st_mode:
        return False
    if one.is_symlink():
        return os.readlink(one) == os.readlink(other)
    if not one.is_file():
        return one.is_dir()
    times = one.stat().st_mtime_ns, other.stat().st_mtime_ns
    return times[0] == times[1] and one.read_bytes() == other.read_bytes()


HOME = ("project", "whole", "elsewhere", "odd")


@contextlib.contextmanager
def within_seconds(limit: int) -> Iterator[None]:
    """TimeoutError for what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {limit} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)


def said(content: dict[str, str]) -> set[tuple[str, str]]:
    """(name, digest) of the files that say what came out."""
    names = ("topk-prompts", "query.png", "train_grad-", "concept_grad.npy", "explorer", "exported")
    files = {(Path(f).name, digest) for f, digest in content.items() if ".part" not in f}
    return {f for f in files if f[0].startswith(names) and not f[0].endswith(".json")}


def related(one: str, other: str) -> bool:
    """Files of one store or one cache: they go together."""
    return bool(other) and Path(one).parent == Path(other).parent


def call(verb: str, flags: dict[str, object]) -> tuple[int, str]:
    """(exit code, standard error) of a verb in this process."""
    from concept_trak import cli

    argv = [verb, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    outputs = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(outputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = cli.main(argv)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
    errors.flush()
    return code, errors.buffer.getvalue().decode()


def cases(project: Project) -> Iterator[Case]:
    """All of them."""
    from concept_trak.settings import flat_fields

    known = {field.name: field.type for field in flat_fields()}
    for name in known:
        for i, text in enumerate(TEXTS):
            if name in LARGE and len(text) > 3:
                continue
            flags = project.flags | {name: text}
            yield Case("variables", f"{name}={text[:20]!r} #{i}", "attribute", flags)
    made = ("/logs/", ".sheets/", "explorer.html")  # which no verb of these reads
    files = [f for f in project.clean if not any(name in f for name in made)]
    for file in files:
        top = file.split("/")[0]
        encoded = top in ("encoded", "grads_encoded", "results_encoded")
        flags = project.encoded if encoded else project.flags
        for how, spoil in kinds_of(project.home / "whole" / file):
            yield Case(f"values of {top}", f"{file} {how}", "attribute", flags, spoil, file)
        for spoil in SPOIL:
            how = spoil.__name__.removeprefix("spoil_")
            kind = f"files of {top}"
            yield Case(kind, f"{file} {how}", "attribute", flags, spoil, file)
            if top in ("grads", "grads_encoded"):
                yield Case(kind, f"{file} {how} train-grad", "train-grad", flags, spoil, file)
            if top == "encoded":
                again = flags | {"source_dir": project.root / "data"}
                yield Case(kind, f"{file} {how} prepare", "prepare", again, spoil, file)


UNREAD = re.compile(r"/logs/|/\.rows/|/topk-|/query_|/concept_grad|/index\.html$|explorer\.html$")


def cases_of_readers(project: Project) -> Iterator[Case]:
    """Verbs beside those of `cases`, each on every file that it reads."""
    results, pictures = project.flags["results_dir"], project.root / "data"
    own = {"source_dir": pictures, "benchmark": "own"}
    asked = ("sd_model_path", "prompt", "target_concepts", "grad_dir", "proj_dim", "nfe")
    verbs = {
        "explore": ("results", {"results_dir": results}),
        "concepts": ("data", {"data_dir": pictures}),
        "estimate": ("data", own | {k: project.flags[k] for k in asked}),
        "export": ("grads", project.export | {"out_dir": project.root / "new", "kind": "numpy"}),
        "suspects": ("grads", project.export | {"results_dir": project.root / "results/qual"}),
        "build-index": ("grads", project.export),
    }
    for verb, (top, flags) in verbs.items():
        for file in (f for f in project.clean if f.startswith(f"{top}/") and not UNREAD.search(f)):
            for how, spoil in every_kind(project.home / "whole" / file):
                yield Case(f"readers, {verb}", f"{file} {how}", verb, flags, spoil, file)


def every_kind(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, spoil) of all that can be wrong with a file."""
    yield from kinds_of(path)
    yield from ((spoil.__name__.removeprefix("spoil_"), spoil) for spoil in SPOIL)


def cases_of_hub(project: Project) -> Iterator[Case]:
    """Answers of the hub."""
    hub = hub_faults.Hub()
    known = frozenset(hub.digests())
    for name, verb, flags, context in hub_faults.cases(hub, project.root / "fetched"):
        yield Case("hub", name, verb, flags, within=context, known=known)


def cases_of_disk(project: Project, moments: int = 8) -> Iterator[Case]:
    """A disk that refuses one of the changes of a verb that writes."""
    disk, new = disk_faults.Disk(), project.root / "new"
    verbs = {
        "train-grad": project.flags | {"grad_dir": new},
        "attribute": project.flags | {"results_dir": new},
        "prepare": project.encoded | {"data_dir": new, "source_dir": project.root / "data"},
        "export": project.export | {"out_dir": new / "exported", "kind": "dattri"},
    }
    for verb, flags in verbs.items():
        with disk.refusing(project.root, 0, 0):
            assert call(verb, flags)[0] == 0
        changes = disk.seen
        project.restore()
        for moment in kills.moments(changes, moments):
            for error in disk_faults.ERRORS:
                within = functools.partial(disk.refusing, project.root, moment, error)
                name = f"{verb} {errno.errorcode[error]} at {moment} of {changes}"
                yield Case("disk", name, verb, flags, within=within, again=True)


def cases_of_places(project: Project) -> Iterator[Case]:
    """A folder that is something else."""
    odd = project.home / "odd"
    odd.mkdir()
    (odd / "file").write_text("a file")
    (odd / "loop").symlink_to("loop")
    (odd / "nowhere").symlink_to("not/there")
    os.mkfifo(odd / "pipe")
    ways = ("file", "file/below", "loop", "loop/below", "nowhere", "pipe", "pipe/below")
    ways += ("a" * 300, "a/" * 2500, "/dev/null", "/dev/null/x", "/proc/self/new", "/proc/1/x")
    folders = ("data_dir", "grad_dir", "results_dir", "sd_model_path", "lora_path", "source_dir")
    for name in folders:
        for way in ways:
            flags = {name: odd / way}
            if name == "source_dir":
                flags |= {"data_dir": project.root / "new"}
            verbs = {"source_dir": ["prepare"], "data_dir": ["prepare", "attribute"]}
            for verb in verbs.get(name, ["train-grad", "attribute"]):
                given = project.flags | {"source_dir": project.root / "data"} | flags
                if verb != "prepare":
                    del given["source_dir"]
                yield Case("places", f"{verb} {name}={way[:20]}", verb, given)


def all_cases(project: Project) -> Iterator[Case]:
    """Of every class."""
    for some in (cases, cases_of_readers, cases_of_hub, cases_of_disk, cases_of_places):
        yield from some(project)


def main() -> None:
    """Run every n-th case and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--show", type=int, default=1000)
    options = parser.parse_args()
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        chosen = [c for c in all_cases(project) if options.only in c.kind][:: options.every]
        for case in chosen:
            outcome = project.run(case)
            short = outcome.fault.split(" ")[0] or "held"
            counts.setdefault(case.kind, Counter())[short] += 1
            if outcome.fault and options.show:
                told = " ".join(outcome.told.split())[-300:]
                print(f"{case.kind} | {case.name} | {outcome.fault} | {told}", flush=True)
    total = sum(counts.values(), Counter())
    print(json.dumps({**{k: dict(v) for k, v in counts.items()}, "all": dict(total)}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
