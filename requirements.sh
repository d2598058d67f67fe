#!/usr/bin/env bash
# Create or update the environment: conda env `concept-trak` if conda is on the PATH, else a virtual
# environment in .venv. A second call does nothing unless pyproject.toml, constraints.txt or environment.yml changed.
#
#   bash requirements.sh
#   ENV_KIND=venv bash requirements.sh         conda|venv overrides
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 bash requirements.sh
#                                              torch from this extra index (whl/cpu: the CPU build;
#                                              empty: none). A torch that is already in the
#                                              environment and within bounds is kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/lib.sh"

unset PYTHONPATH # its packages would count as installed; an empty item of it is the working folder
CPU_INDEX_URL=https://download.pytorch.org/whl/cpu
python='' # the environment's interpreter and folder, set by main
prefix=''
MIN_FREE_MB=3000 # with a CPU build of torch 1.5 GB, and pip unpacks each wheel beside it

check_disk() {
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge "$MIN_FREE_MB" ] ||
        die "only $free MB free on the disk of $1; the environment needs $MIN_FREE_MB;" \
            "make room, or set PYTHON_BIN to a Python with concept-trak installed"
}

# Print the first interpreter that can make a virtual environment; prefer 3.11 and newer, for which
# the tested versions exist.
base_python() {
    local minimum name found=
    for minimum in 11 10; do
        for name in python3 python3.11 python3.12 python3.13 python3.14 python3.10; do
            "$name" -I -c "import sys; sys.exit(sys.version_info < (3, $minimum))" 2>/dev/null ||
                continue
            found=$name
            "$name" -I -c 'import venv, ensurepip' 2>/dev/null && { echo "$name"; return; }
        done
    done
    [ -z "$found" ] || die "$found has no venv module; install it (Debian, Ubuntu:" \
        "apt install python3-venv), or set ENV_KIND=conda"
    die "no Python >= 3.10 on the PATH (python3 is $(python3 --version 2>&1 || true));" \
        "install one, or set ENV_KIND=conda"
}

make_venv() {
    local base
    # An interrupted set-up can leave an interpreter without pip, and an upgraded system a dangling
    # link: then start afresh.
    if "$ROOT/.venv/bin/python" -I -m pip --version >/dev/null 2>&1; then return; fi
    base=$(base_python)
    echo "creating the virtual environment .venv with $base"
    "$base" -I -m venv --clear "$ROOT/.venv" ||
        die "could not create $ROOT/.venv with $base -m venv; remove it and run the same again:" \
            "rm -r $ROOT/.venv"
}

make_conda_env() {
    local action=create prefix
    command -v conda >/dev/null || die "conda is not on the PATH; install it or set ENV_KIND=venv"
    prefix=$(conda_prefix)
    [ -z "$prefix" ] || action=update
    echo "conda env $action: $ENV_NAME"
    conda env "$action" -n "$ENV_NAME" -f "$ROOT/environment.yml" ||
        die "conda env $action failed for $ROOT/environment.yml; without conda:" \
            "ENV_KIND=venv bash requirements.sh"
}

# pip_install WHAT ARGUMENT...: quiet, with a log; a failure is one line with pip's own last error.
pip_install() {
    local what=$1 log="$prefix/concept-trak-install.log" cause
    shift
    echo "installing $what into $prefix (some minutes)"
    if "$python" -I -m pip install "$@" >"$log" 2>&1; then return; fi
    cause=$(grep -E '^ERROR|No space left' "$log" | tail -n 1 || true)
    die "pip could not install $what: ${cause:-unknown cause}. The whole log: $log. Then go on:" \
        "bash requirements.sh"
}

# torch first and alone, because it is the one package with several builds: PyPI's for Linux on
# x86-64 brings several GB of CUDA libraries, so without an NVIDIA GPU the CPU index is asked too.
# One try only: out of reach, it leaves pip its other sources.
install_torch() {
    local arguments=(--no-deps -c "$ROOT/constraints.txt")
    if [ -n "${TORCH_INDEX_URL-}" ]; then
        arguments+=(--extra-index-url "$TORCH_INDEX_URL")
    elif [ -z "${TORCH_INDEX_URL+set}" ] && [ "$(uname -sm)" = "Linux x86_64" ] &&
        ! command -v nvidia-smi >/dev/null; then
        arguments+=(--extra-index-url "$CPU_INDEX_URL" --retries 0)
    fi
    pip_install torch "${arguments[@]}" "torch$torch_bounds"
}

# Is torch installed and within bounds? --isolated and --no-index leave pip only the environment to
# satisfy the requirement from.
has_torch_within_bounds() {
    "$python" -I -m pip --isolated install --quiet --dry-run --no-index --no-deps \
        "torch$torch_bounds" >/dev/null 2>&1
}

install_package() {
    local torch_bounds pins="$prefix/concept-trak-constraints.txt"
    torch_bounds=$(sed -n 's/^ *"torch\([<>=!~][^"]*\)",*$/\1/p' "$ROOT/pyproject.toml")
    cp "$ROOT/constraints.txt" "$pins"
    if has_torch_within_bounds; then
        grep -v '^torch==' "$ROOT/constraints.txt" >"$pins" # keep the build that is there
    else
        install_torch
    fi
    pip_install "the package and its requirements" -e "${ROOT}[test,abc,docs]" -c "$pins"
}

main() {
    local kind=${ENV_KIND:-}
    if [ -z "$kind" ]; then
        kind=venv
        ! command -v conda >/dev/null || kind=conda
    fi
    case "$kind" in conda | venv) ;; *) die "ENV_KIND=$kind is neither conda nor venv; set ENV_KIND=venv" ;; esac
    if python=$(ENV_KIND=$kind PYTHON_BIN='' find_python) &&
        stamp_is_current "$(env_prefix "$python")"; then
        echo "environment is up to date: $(env_prefix "$python")"
        return
    fi
    # Two scripts started at once must not install into one environment together; the second waits,
    # then finds the stamp.
    if [ -z "${CONCEPT_TRAK_LOCKED:-}" ] && command -v flock >/dev/null; then
        CONCEPT_TRAK_LOCKED=1 exec flock "$ROOT" bash "$ROOT/requirements.sh"
    fi
    check_disk "$ROOT"
    if [ "$kind" = conda ]; then make_conda_env; else make_venv; fi
    python=$(ENV_KIND=$kind PYTHON_BIN='' find_python) ||
        die "the $kind environment was created but has no interpreter; remove it:" \
            "rm -r $ROOT/.venv, or conda env remove -n $ENV_NAME"
    prefix=$(env_prefix "$python")
    export PYTHONNOUSERSITE=1 # packages of the user's site would count as installed
    install_package
    wanted_stamp >"$prefix/$STAMP_NAME"
    echo "environment is ready: $prefix"
}

main
