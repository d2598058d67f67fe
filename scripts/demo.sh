#!/usr/bin/env bash
# Set up if needed, attribute a picture of a pair that the embedded model never saw, and say where the report is.
# Example: bash scripts/demo.sh      (every variable of scripts/emoji/run_qual_free.sh works here too)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_env
exec 3>&1 # what it says appears as it comes, and is kept
told=$'\n'$(bash "$ROOT/scripts/emoji/run_qual_free.sh" "$@" | tee -i /dev/fd/3)
report=${told##*$'\n'report: }
[ "$report" = "$told" ] || printf '\nOpen in a browser:\n%s\n' "$report" # --help writes none
