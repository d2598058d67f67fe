#!/usr/bin/env bash
# Set up if needed, then check format, lint rules and types (pyproject.toml has them); every finding
# is told before it fails. It changes nothing: `ruff format` and `ruff check --fix` do.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_env
cd "$ROOT" # Python finds code in the working folder
status=0
"$PYTHON" -m ruff format --check || status=1
"$PYTHON" -m ruff check || status=1
"$PYTHON" -m mypy || status=1
exit "$status"
