#!/usr/bin/env bash
# Set up if needed, then run the tests; arguments go to pytest.
# Example: bash scripts/test.sh tests/test_setup.py -k conda
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_env
cd "$ROOT"
# The tests' tensors are small: beyond a few threads torch spends its time on synchronising them.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
exec "$PYTHON" -m pytest "$@"
