#!/usr/bin/env bash
# Set up if needed, then run the tests; arguments go to pytest. A process on each core, at most
# four, unless the arguments name one file, say -n, or ask for what needs one process.
# Example: bash scripts/test.sh tests/test_setup.py -k conda
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_env
cd "$ROOT" # Python finds code in the working folder
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
cores=$((cores < 4 ? cores : 4)) # the tests' tensors are small: more threads only wait for another
files=0
spread=yes
for argument in "$@"; do
    case "$argument" in
        -n* | --numprocesses*) spread=asked ;;
        *no:xdist | -s | --capture=no | --pdb | --trace) spread=no ;;
        *.py | *.py::*) files=$((files + 1)) ;;
    esac
done
if [ "$spread" = yes ] && { [ "$files" = 1 ] || ! "$PYTHON" -c 'import xdist' 2>/dev/null; }; then
    spread=no
fi
if [ "$spread" = no ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two busy processes of two threads wait for cores
    # worksteal: neighbours stay in one process, so a module's fixture is mostly made once
    [ "$spread" = asked ] || set -- -n "$cores" --dist worksteal "$@"
fi
exec "$PYTHON" -m pytest "$@"
