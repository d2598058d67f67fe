#!/usr/bin/env bash
# Set up if needed, attribute a picture of a pair that the embedded model never saw, and say where the report is.
# Example: bash scripts/demo.sh      (every variable of scripts/emoji/run_qual_free.sh works here too)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_env # before the marker, so that only this run's reports are newer
marker=$(mktemp)
trap 'rm -f "$marker"' EXIT
bash "$ROOT/scripts/emoji/run_qual_free.sh" "$@"
results=${RESULTS_DIR:-$ROOT/experiments/emoji/results}
reports=$(find "$results" -name report.html -newer "$marker" 2>/dev/null || true)
[ -n "$reports" ] || die "no report.html was written under $results; run the same again with another RESULTS_DIR"
printf '\nOpen in a browser:\n%s\n' "$reports"
