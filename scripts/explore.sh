#!/usr/bin/env bash
# Make the explorer, one page of all answers there are, and open it in a browser where there is one.
# Example, the answers of one folder: RESULTS_DIR=experiments/emoji/results/qual bash scripts/explore.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
told=$(run_verb explore --benchmark emoji "$@")
printf '%s\n' "$told"
page=./${told##*explorer: } # a name that begins with a dash is no option
if [ -t 1 ] && [ -f "$page" ]; then
    for open in xdg-open open; do
        command -v "$open" >/dev/null || continue
        "$open" "$page" >/dev/null 2>&1 && exit 0
    done
fi
