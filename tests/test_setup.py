"""Set-up and bash layer, without network: interpreters, pip, conda and df are stand-ins that
record how they are called. Then what pyproject.toml declares, against what is imported.
"""

import ast
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from concept_trak import settings

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
SCRIPTS = sorted([REPO / "requirements.sh", REPO / ".ci/run", *(REPO / "scripts").rglob("*.sh")])
VERBS = {
    "emoji/run_qual_free.sh": ["attribute", "--benchmark", "emoji"],
    "emoji/run_train_grad.sh": ["train-grad", "--benchmark", "emoji"],
    "emoji/run_eval.sh": ["evaluate", "--benchmark", "emoji"],
    "emoji/train_model.sh": ["train-model", "--benchmark", "emoji"],
    "bench.sh": ["bench"],
}
TOOLS = (
    "awk basename bash cat cp cut df dirname env find flock getconf grep mkdir mktemp rm sed "
    "seq sha256sum shasum tail tee tr uname"
).split()

# Records "NAME|ARG|ARG" and plays the interpreter: `-m venv` copies it, pip does nothing.
# Its first argument is -I: no folder of the user's is on the path.
FAKE_PYTHON = """#!/bin/bash
record="$0"; for argument in "$@"; do record+="|$argument"; done; echo "$record" >>"$LOG"
case "$*" in
    *find_spec*) [ -e "$(dirname "$0")/has_package" ] ;;
    *"import sys; sys.exit(sys.version_info"*) [ -z "${OLD_PYTHON:-}" ] ;;
    *"import venv, ensurepip"*) [ -z "${NO_VENV:-}" ] ;;
    --version) echo "Python 3.8.1" ;;
    "-I -m venv --clear "*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    *"pip --isolated install"*) [ -n "${TORCH_PRESENT:-}" ] ;;
    *"pip install"*-e*)
        cp "${!#}" "$LOG.constraints"
        [ -z "${PIP_ERROR:-}" ] || { echo "$PIP_ERROR"; exit 1; } ;;
    "-I -u "*"/isolated.py concept_trak attribute "*) echo "report: $RESULTS_DIR/one/report.html" ;;
    *"import xdist"*) [ -z "${NO_XDIST:-}" ] ;;
    "-m ruff check"*) exit "${LINT_STATUS:-0}" ;;
    "-m pytest"*) echo "threads: $OMP_NUM_THREADS"; exit "${PYTEST_STATUS:-0}" ;;
esac
"""

FAKE_CONDA = """#!/bin/bash
echo "conda|$*" >>"$LOG"
prefix=$(dirname "$(dirname "$0")")/envs/concept-trak
case "$1 $2" in
    "env create") mkdir -p "$prefix/bin" && cp "$FAKE_PYTHON" "$prefix/bin/python" ;;
    "env list") echo "concept-trak  ${CONDA_ENV_ELSEWHERE:-}" ;;
esac
"""


class Sandbox:
    """A copy of the set-up files, and a PATH that holds only stand-ins and the core tools."""

    def __init__(self, folder):
        self.repo = folder / "a repo"  # with a space: paths must be quoted
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.bin.mkdir()
        for name in TOOLS:
            if shutil.which(name):
                (self.bin / name).symlink_to(shutil.which(name))
        shutil.copytree(REPO / "scripts", self.repo / "scripts")
        shutil.copytree(REPO / ".ci", self.repo / ".ci")
        for name in ("requirements.sh", "pyproject.toml", "constraints.txt", "environment.yml"):
            shutil.copy(REPO / name, self.repo)
        self.python = self.executable(self.bin / "python3", FAKE_PYTHON)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder / "home"),
            "LOG": str(self.log),
            "FAKE_PYTHON": str(self.python),
            "RESULTS_DIR": str(folder / "results"),
        }

    def executable(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def environment(self, prefix, has_package=True):
        """A made-up environment, with or without concept-trak in it; returns its interpreter."""
        python = self.executable(prefix / "bin" / "python", FAKE_PYTHON)
        if has_package:
            (prefix / "bin" / "has_package").touch()
        return python

    def conda(self):
        return self.executable(self.bin.parent / "conda" / "bin" / "conda", FAKE_CONDA)

    def bash(self, *command, **env):
        """Run bash outside the repository; returns the finished process and the calls it made."""
        self.log.write_text("")
        done = subprocess.run(
            ["bash", *map(str, command)],
            env={**self.env, **{k: str(v) for k, v in env.items()}},
            cwd=self.bin.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, self.log.read_text().splitlines()

    def requirements(self, **env):
        return self.bash(self.repo / "requirements.sh", **env)

    def lib(self, code, *args, **env):
        code = f'set -o pipefail; source "$1/scripts/lib.sh"; shift; {code}'
        return self.bash("-euc", code, "lib", self.repo, *args, **env)

    def find_python(self, **env):
        done, _ = self.lib("find_python", **env)
        return done.stdout.strip()


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def with_conda(sandbox):
    return f"{sandbox.conda().parent}:{sandbox.bin}"


def installs(calls):
    return [call for call in calls if "|pip|install|" in call]


def is_one_line_of_error(done):
    return done.returncode != 0 and len(done.stderr.splitlines()) == 1


# --- variables become flags

VALUES = ["", "a cat, on a mat", "cat|openmoji line", 'it\'s "quoted"', "$HOME `x` \\n *"]


@pytest.mark.parametrize("value", [*VALUES, "-1", "--top-k", "two\nlines", "a=b"])
def test_value_reaches_the_command_line_unchanged(sandbox, value):
    done, _ = sandbox.lib('flags_from_env PROMPT; printf "%s\\0" "${FLAGS[@]}"', PROMPT=value)
    assert done.stdout == f"--prompt={value}\0", done.stderr


def test_unset_variable_is_not_passed(sandbox):
    code = 'flags_from_env PROMPT SEED TOP_K; echo "${#FLAGS[@]} ${FLAGS[0]}"'
    done, _ = sandbox.lib(code, TOP_K=9)
    assert done.stdout.strip() == "1 --top-k=9"


def test_no_variable_set_gives_no_flag(sandbox):
    done, _ = sandbox.lib('flags_from_env PROMPT SEED; echo "${#FLAGS[@]}"')
    assert done.stdout.strip() == "0", done.stderr


def test_every_setting_has_its_variable(sandbox):
    done, _ = sandbox.lib('printf "%s\\n" "${SETTING_VARIABLES[@]}"')
    assert sorted(done.stdout.split()) == sorted(name.upper() for name in settings.names())


# --- every script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_script_parses_and_needs_no_activation(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    text = script.read_text()
    assert not re.search(r"\bactivate\b", text)
    assert script.name == "lib.sh" or "set -euo pipefail" in text  # lib.sh is sourced


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_script_mentions_only_existing_files(script):
    text = script.read_text().replace("$ROOT/", "").replace("$scripts/", "scripts/")
    for name in re.findall(r"[\w./-]+\.(?:sh|py|yml|toml|md)\b", text):
        name = name.lstrip("/")
        found = (REPO / name).exists() or (script.parent / name).exists()
        assert found, f"{script.name} mentions {name}"


@pytest.mark.parametrize("name, verb", VERBS.items(), ids=VERBS)
def test_script_calls_its_verb_with_variables_then_arguments(sandbox, name, verb):
    variables = {"TOP_K": 7, "NEGATIVE_PROMPT": "", "PYTHON_BIN": sandbox.python}
    done, calls = sandbox.bash(sandbox.repo / "scripts" / name, "--top-k", "3 4", **variables)
    assert done.returncode == 0, done.stderr
    [call] = calls
    _, isolated, unbuffered, start, module, called, *arguments = call.split("|")
    assert [isolated, unbuffered, module, called] == ["-I", "-u", "concept_trak", verb[0]]
    assert start == f"{sandbox.repo}/concept_trak/isolated.py"
    results = f"--results-dir={sandbox.env['RESULTS_DIR']}"
    assert sorted(arguments[:3]) == ["--negative-prompt=", results, "--top-k=7"]
    # last, so that an argument wins over a variable
    assert arguments[3:] == [*verb[1:], "--top-k", "3 4"]


def test_the_judge_learns_from_all_art_unless_other_pictures_are_named(sandbox):
    script, art = sandbox.repo / "scripts/emoji/train_judge.sh", sandbox.repo / "data/emoji-s8-n364"
    done, calls = sandbox.bash(script, PYTHON_BIN=sandbox.python)
    assert done.returncode == 0, done.stderr
    assert f"--preset|s8-n364|--out|{art}|" in calls[-2]
    assert f"|train-judge|--data-dir={art}|" in calls[-1]
    [call] = sandbox.bash(script, PYTHON_BIN=sandbox.python, DATA_DIR="mine", RESULTS_DIR="")[1]
    assert "|train-judge|--data-dir=mine|" in call


def test_demo_sets_up_and_names_the_report(sandbox):
    done, calls = sandbox.bash(sandbox.repo / "scripts" / "demo.sh")
    assert done.returncode == 0, done.stderr
    report = f"{sandbox.env['RESULTS_DIR']}/one/report.html"
    assert done.stdout.endswith(f"Open in a browser:\n{report}\n")
    assert installs(calls) and "|attribute|" in calls[-1]


@pytest.mark.parametrize(
    "arguments, results",
    [
        (["--results-dir", "elsewhere"], "elsewhere"),
        (["-q"], "-x"),
        ([], "two  words"),
        ([], "a\nline"),
        ([], "report: x"),
    ],
)
def test_demo_names_the_report_that_was_written_wherever_it_is(sandbox, arguments, results):
    demo, env = sandbox.repo / "scripts/demo.sh", {"PYTHON_BIN": sandbox.python}
    done, _ = sandbox.bash(demo, *arguments, **env, RESULTS_DIR=results)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Open in a browser:\n{results}/one/report.html\n")


def test_demo_ends_as_the_verb_does(sandbox):
    sandbox.executable(sandbox.python, "#!/bin/bash\necho 'error: no' >&2\nexit 2\n")
    done, _ = sandbox.bash(sandbox.repo / "scripts/demo.sh", PYTHON_BIN=sandbox.python)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no\n")


# --- folders: what cd would take for something else

FOLDERS = ["-", "-P", "--", "-L x", "two  words", "a\nline", "ends\n", "~", "$HOME", "*", "pics/"]


@pytest.mark.parametrize("name", FOLDERS)
def test_own_pictures_are_those_of_the_folder_that_is_named(sandbox, name):
    here, home = sandbox.bin.parent, sandbox.bin.parent / "home"
    for folder in (here / name, home / name, here / "elsewhere" / name):
        folder.mkdir(parents=True)
    script, words = sandbox.repo / "scripts/abc/run_own_data.sh", {"PROMPT": "x"}
    # the record has a line for each call: names with line breaks are shown by `printf %q`
    sandbox.executable(sandbox.python, '#!/bin/bash\nprintf "%q " "$@" >>"$LOG"; echo >>"$LOG"\n')
    words |= {"TARGET_CONCEPTS": "x", "PYTHON_BIN": sandbox.python, "OLDPWD": home}
    done, calls = sandbox.bash(script, name, **words, CDPATH=here / "elsewhere")
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = subprocess.run(
        ["bash", "-c", 'printf %q "$1"', "x", f"--source-dir={here / name}"],
        capture_output=True,
        text=True,
    )
    source = shown.stdout.removesuffix("/")
    assert len(calls) == 5 and all(source in call for call in calls[:2])


@pytest.mark.parametrize("cdpath", [".", "..", "{repo}", ".:/", "{repo}/scripts:."])
def test_an_exported_cdpath_changes_nothing(sandbox, cdpath):
    cdpath = cdpath.format(repo=sandbox.repo)
    done, _ = sandbox.lib('echo "$ROOT"', CDPATH=cdpath)
    assert done.stdout == f"{sandbox.repo}\n"
    script = f"{sandbox.repo.name}/scripts/slurm_array.sh"  # by a path that cd would look for
    slurm = {"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_COUNT": 2, "GPU_ID": 3, "NUM_SPLIT": 4}
    done, [call] = sandbox.bash(script, **slurm, CDPATH=cdpath, PYTHON_BIN=sandbox.python)
    assert done.returncode == 0 and "|--shards=1,3|" in call and "--gpu-id" not in call


@pytest.mark.parametrize("variable", ["DATA_DIR", "GRAD_DIR", "RESULTS_DIR"])
def test_an_empty_path_reaches_the_settings_which_refuse_it(sandbox, variable):
    (sandbox.bin.parent / "pics").mkdir()
    env = {"PROMPT": "x", "TARGET_CONCEPTS": "x", "PYTHON_BIN": sandbox.python, variable: ""}
    _, calls = sandbox.bash(sandbox.repo / "scripts/abc/run_own_data.sh", "pics", **env)
    assert calls and f"|--{variable.lower().replace('_', '-')}=|" in f"{calls[0]}|"


@pytest.mark.parametrize("variable", ["OUT_DIR", "WORK"])
def test_art_is_built_into_no_empty_path(sandbox, variable):
    env = {"PYTHON_BIN": sandbox.python, variable: ""}
    done, calls = sandbox.bash(sandbox.repo / "scripts/emoji/build_data.sh", **env)
    assert is_one_line_of_error(done) and f"{variable} is empty" in done.stderr and not calls


def test_the_set_up_starts_no_python_that_looks_into_the_working_folder(sandbox):
    _, calls = sandbox.requirements()
    pythons = [call for call in calls if "python" in call.split("|")[0]]
    assert len(pythons) > 5 and all(call.split("|")[1] in ("-I", "--version") for call in pythons)


@pytest.mark.parametrize("status", [0, 1, 5])
def test_ci_exits_with_the_code_of_the_tests(sandbox, status):
    done, calls = sandbox.bash(sandbox.repo / ".ci" / "run", PYTEST_STATUS=status)
    assert done.returncode == status
    assert installs(calls) and "|-m|pytest" in calls[-1]


def test_ci_fails_for_lint_and_runs_the_tests_all_the_same(sandbox):
    done, calls = sandbox.bash(sandbox.repo / ".ci" / "run", LINT_STATUS=1)
    assert done.returncode == 1 and "|-m|pytest" in calls[-1]


@pytest.mark.parametrize("status", [0, 1])
def test_lint_runs_every_check_and_fails_when_one_does(sandbox, status):
    variables = {"PYTHON_BIN": sandbox.python, "LINT_STATUS": status}
    done, calls = sandbox.bash(sandbox.repo / "scripts/lint.sh", **variables)
    assert done.returncode == status
    ran = [call.split("|", 2)[2] for call in calls]
    assert ran == ["ruff|format|--check", "ruff|check", "mypy"]


@pytest.mark.parametrize(
    "arguments, processes, threads",
    [
        ([], 4, 1),
        (["tests/gradients", "-k", "name"], 4, 1),
        (["tests/x.py", "tests/y.py"], 4, 1),
        (["tests/x.py", "-k", "name"], None, 4),
        (["tests/x.py::test_one"], None, 4),
        (["-n", "2", "tests/x.py"], None, 1),  # theirs to say
        (["-p", "no:xdist"], None, 4),
        (["--pdb"], None, 4),
    ],
)
def test_tests_get_a_process_a_core_unless_told_otherwise(sandbox, arguments, processes, threads):
    (sandbox.bin / "getconf").unlink()
    sandbox.executable(sandbox.bin / "getconf", "#!/bin/bash\necho 8\n")
    script, env = sandbox.repo / "scripts/test.sh", {"PYTHON_BIN": sandbox.python}
    done, calls = sandbox.bash(script, *arguments, **env)
    spread = [] if processes is None else ["-n", str(processes), "--dist", "worksteal"]
    assert calls[-1].split("|")[3:] == [*spread, *arguments]
    assert done.stdout.endswith(f"threads: {threads}\n")
    assert "|-n|4" not in sandbox.bash(script, **env, NO_XDIST=1)[1][-1]


# --- finding the environment


def test_find_python_order(sandbox, tmp_path):
    conda = sandbox.environment(sandbox.conda().parent.parent / "envs" / "concept-trak")
    path = {"PATH": with_conda(sandbox)}
    assert sandbox.find_python() == ""
    assert sandbox.find_python(**path) == str(conda)
    venv = sandbox.environment(sandbox.repo / ".venv")
    assert sandbox.find_python(**path) == str(venv)
    active = sandbox.environment(tmp_path / "active")
    assert sandbox.find_python(CONDA_PREFIX=tmp_path / "active", **path) == str(active)
    path["VIRTUAL_ENV"] = tmp_path / "active"
    assert sandbox.find_python(**path) == str(active)
    assert sandbox.find_python(ENV_KIND="conda", **path) == str(conda)
    assert sandbox.find_python(ENV_KIND="venv", **path) == str(venv)
    assert sandbox.find_python(PYTHON_BIN=sandbox.python, **path) == str(sandbox.python)


def test_active_environment_without_the_package_is_passed_over(sandbox, tmp_path):
    sandbox.environment(tmp_path / "active", has_package=False)
    venv = sandbox.environment(sandbox.repo / ".venv")
    assert sandbox.find_python(VIRTUAL_ENV=tmp_path / "active") == str(venv)


def test_conda_environment_in_a_folder_of_its_own_is_found(sandbox, tmp_path):
    python = sandbox.environment(tmp_path / "elsewhere" / "concept-trak")
    told = {"PATH": with_conda(sandbox), "CONDA_ENV_ELSEWHERE": python.parent.parent}
    assert sandbox.find_python(**told) == str(python)
    searched = {"CONDA_ENVS_PATH": f"{tmp_path}/none:{tmp_path}/elsewhere"}
    assert sandbox.find_python(**searched) == str(python)


def test_python_bin_is_never_installed_into(sandbox):
    done, calls = sandbox.lib('ensure_env; echo "$PYTHON"', PYTHON_BIN=sandbox.python)
    assert done.stdout.strip() == str(sandbox.python) and calls == []
    done, calls = sandbox.lib("ensure_env", PYTHON_BIN="/no/such/python")
    assert is_one_line_of_error(done) and "/no/such/python" in done.stderr


def test_active_environment_of_the_user_is_used_as_it_is(sandbox, tmp_path):
    active = sandbox.environment(tmp_path / "active")
    done, calls = sandbox.lib('ensure_env; echo "$PYTHON"', VIRTUAL_ENV=tmp_path / "active")
    assert done.stdout.strip() == str(active) and not installs(calls)


def test_changed_requirements_are_installed_before_the_work(sandbox):
    sandbox.requirements()
    assert not installs(sandbox.lib("ensure_env")[1])
    with open(sandbox.repo / "constraints.txt", "a") as file:
        file.write("# changed\n")
    assert installs(sandbox.lib("ensure_env")[1])
    assert not installs(sandbox.lib("ensure_env")[1])


# --- requirements.sh


def test_second_setup_calls_nothing(sandbox):
    done, calls = sandbox.requirements()
    assert done.returncode == 0, done.stderr
    assert len(installs(calls)) == 2 and (sandbox.repo / ".venv" / "bin" / "python").exists()
    done, calls = sandbox.requirements()
    assert done.returncode == 0 and calls == []


def test_conda_environment_is_created_once_and_used_by_its_path(sandbox):
    path = with_conda(sandbox)
    done, calls = sandbox.requirements(PATH=path)
    assert done.returncode == 0, done.stderr
    prefix = sandbox.bin.parent / "conda" / "envs" / "concept-trak"
    assert [call for call in calls if call.startswith("conda|env create")] == [
        f"conda|env create -n concept-trak -f {sandbox.repo}/environment.yml"
    ]
    assert {call.split("|")[0] for call in installs(calls)} == {f"{prefix}/bin/python"}
    assert not (sandbox.repo / ".venv").exists()
    assert sandbox.requirements(PATH=path)[1] == []
    done, calls = sandbox.lib('ensure_env; echo "$PYTHON"', PATH=path)
    assert done.stdout.strip() == f"{prefix}/bin/python" and calls == []


def test_changed_environment_file_updates_the_conda_environment(sandbox):
    path = with_conda(sandbox)
    sandbox.requirements(PATH=path)
    with open(sandbox.repo / "environment.yml", "a") as file:
        file.write("# changed\n")
    _, calls = sandbox.requirements(PATH=path)
    assert f"conda|env update -n concept-trak -f {sandbox.repo}/environment.yml" in calls


def test_env_kind_overrides(sandbox):
    done, calls = sandbox.requirements(PATH=with_conda(sandbox), ENV_KIND="venv")
    assert done.returncode == 0 and (sandbox.repo / ".venv").exists()
    assert not any("conda|" in call for call in calls)
    for kind, word in (("conda", "conda is not on the PATH"), ("docker", "ENV_KIND=docker")):
        done, _ = sandbox.requirements(ENV_KIND=kind)
        assert is_one_line_of_error(done) and word in done.stderr


def test_torch_within_bounds_is_kept(sandbox):
    _, calls = sandbox.requirements(TORCH_PRESENT=1)
    assert len(installs(calls)) == 1
    pins = Path(f"{sandbox.log}.constraints").read_text()
    assert "torch==" not in pins and "diffusers==" in pins


def test_torch_index(sandbox):
    (sandbox.bin / "uname").unlink()  # elsewhere PyPI's torch is a CPU build already
    sandbox.executable(sandbox.bin / "uname", "#!/bin/bash\necho Linux x86_64\n")

    def torch_call(**env):
        shutil.rmtree(sandbox.repo / ".venv", ignore_errors=True)
        return installs(sandbox.requirements(**env)[1])[0]

    chosen = "https://example.org/cu"
    assert f"|--extra-index-url|{chosen}|" in torch_call(TORCH_INDEX_URL=chosen)
    assert "--extra-index-url" not in torch_call(TORCH_INDEX_URL="")
    assert "|--extra-index-url|https://download.pytorch.org/whl/cpu|" in torch_call()
    sandbox.executable(sandbox.bin / "nvidia-smi", "#!/bin/bash\n")
    assert "--extra-index-url" not in torch_call()


@pytest.mark.parametrize(
    "env, words",
    [
        ({"OLD_PYTHON": 1}, ["Python >= 3.10", "3.8.1"]),
        ({"NO_VENV": 1}, ["no venv module", "python3-venv"]),
        ({"PIP_ERROR": "ERROR: No matching distribution: dattri"}, ["distribution: dattri"]),
        ({"PIP_ERROR": "OSError: [Errno 28] No space left on device"}, ["No space left on device"]),
    ],
)
def test_failed_setup_is_one_clear_line_and_is_tried_again(sandbox, env, words):
    done, _ = sandbox.requirements(**env)
    assert is_one_line_of_error(done)
    assert all(word in done.stderr for word in words), done.stderr
    done, calls = sandbox.requirements()
    assert done.returncode == 0 and installs(calls)


def test_full_disk_is_told_before_anything_is_made(sandbox):
    (sandbox.bin / "df").unlink()
    full = "#!/bin/bash\necho Filesystem\necho /dev/x 100 100 204800 1% /\n"
    sandbox.executable(sandbox.bin / "df", full)
    done, calls = sandbox.requirements()
    assert is_one_line_of_error(done) and "only 200 MB free" in done.stderr
    assert not installs(calls) and not (sandbox.repo / ".venv").exists()


# --- what is declared, pinned and imported

PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
# where the name of the import is another
DISTRIBUTIONS = {"PIL": "pillow", "trak": "traker", "dicebear": "dicebear-core"}
DISTRIBUTIONS |= {"faiss": "faiss-cpu"}
# declared for the user, or for what another package imports by itself
NOT_IMPORTED = {"accelerate", "traker"}


def declared(*texts):
    return {canonicalize_name(Requirement(text).name) for text in texts}


def imported(folder, local=()):
    """{distribution: a file that imports it} for every third-party import below a folder."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, *local}:
                found[canonicalize_name(DISTRIBUTIONS.get(name, name))] = path.name
    return found


def test_every_import_is_declared():
    own = {"concept_trak", "experiments"}
    library = imported(REPO / "concept_trak") | imported(REPO / "experiments", own)
    tests = {p.stem for p in REPO.glob("tests/**/*.py")}
    needed = declared(*PROJECT["dependencies"])
    optional = declared(*(line for name in EXTRAS if name != "test" for line in EXTRAS[name]))
    assert not (undeclared := library.keys() - needed - optional), undeclared
    theirs = imported(REPO / "tests", {*own, *tests}).keys()
    testing = declared(*EXTRAS["test"], *EXTRAS["cluster"], *EXTRAS["s3"])  # of .ci/run
    assert not (undeclared := theirs - needed - testing - {"tomllib", "pyarrow", "mkdocs"}), (
        undeclared
    )
    assert needed - library.keys() <= NOT_IMPORTED, "declared, and imported nowhere"
    assert declared(*EXTRAS["abc"]) <= testing  # what can be installed is tested


def test_every_dependency_is_pinned_within_its_bounds():
    text = (REPO / "constraints.txt").read_text()
    lines = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in lines}
    for requirement in map(Requirement, [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]):
        if requirement.marker is None or requirement.marker.evaluate():
            pin = pins[canonicalize_name(requirement.name)]
            assert pin in requirement.specifier, requirement
    assert "+" not in pins["torch"]  # CPU and CUDA builds of the release satisfy the pin alike


def test_every_module_that_states_a_protocol_is_type_checked():
    checked = {REPO / name for name in PYPROJECT["tool"]["mypy"]["files"]}
    stating = {
        path
        for top in ("concept_trak", "experiments")
        for path in (REPO / top).rglob("*.py")
        if re.search(r"^class \w+\(.*\b(Protocol|ABC)\b", path.read_text(), re.MULTILINE)
    }
    assert checked and all(path.is_file() for path in checked)
    assert not (left := stating - checked), left


def test_torchvision_is_neither_required_nor_imported():
    for name in ("pyproject.toml", "environment.yml"):
        assert not re.search(r"^[^#]*torchvision", (REPO / name).read_text(), re.MULTILINE)
    for path in [*REPO.glob("concept_trak/**/*.py"), *REPO.glob("experiments/**/*.py")]:
        assert not re.search(r"^\s*(import|from) torchvision", path.read_text(), re.MULTILINE), path


def test_nothing_that_a_run_writes_is_committed():
    """Scripts write to experiments/*/results and data/emoji/checkpoints; Gram files are caches."""
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    written = ["experiments/*/results/*", "data/emoji/checkpoints/*", "*gram-*.npy", "*.part"]
    listed = subprocess.run(
        ["git", "ls-files", "--", *written], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert listed.stdout == ""
    for path in (
        "experiments/emoji/results/eval/table.md",
        "data/emoji/grads/x/gram-float64-1.npy",
    ):
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=REPO).returncode == 0
