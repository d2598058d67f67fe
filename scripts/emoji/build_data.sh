#!/usr/bin/env bash
# Build data/emoji from pinned npm packages (needs Node's npm). The last line of output is the sha256 of the finished tree.
#   bash scripts/emoji/build_data.sh                            # the embedded preset: 128 objects x 8 styles
#   PRESET=s6-n64 OUT_DIR=data/emoji-s6-n64 bash scripts/emoji/build_data.sh
# PRESET (s5i, s6, s7i, s8 by n64, n128, n256; s8-n364), OUT_DIR, WORK (download cache), SIZE (pixels), PYTHON_BIN.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

PRESET=${PRESET:-s8-n128}
if [ "$PRESET" = s8-n128 ]; then DEFAULT_OUT=$ROOT/data/emoji; else DEFAULT_OUT=$ROOT/data/emoji-$PRESET; fi

for name in OUT_DIR WORK; do
    [ -n "${!name-unset}" ] || die "$name is empty, which is no path; give $name one, or leave it out: unset $name"
done
ensure_env
# The renderer is needed only here, so it is an extra of the package; pyproject.toml holds its version.
"$PYTHON" -I -c 'import fontTools, resvg_py' 2>/dev/null ||
    "$PYTHON" -I -m pip install --quiet -c "$ROOT/constraints.txt" -e "$ROOT[build-data]" >&2
in_place=exec
run_module experiments.emoji.artwork.build \
    --preset "$PRESET" --out "${OUT_DIR-$DEFAULT_OUT}" --work "${WORK-$ROOT/build/emoji}" --size "${SIZE:-64}"
