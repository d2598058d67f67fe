# Shared by every script: finds the environment, sets it up, turns variables into flags. Source it; by itself it runs nothing.
# Defaults stand in concept_trak/settings.py. A script passes on only what the caller has set.

unset CDPATH           # or cd would look there first, and print where it went
unset PYTHONOPTIMIZE   # at 2 it takes the docstrings that transformers needs
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
ENV_NAME=concept-trak
STAMP_NAME=.concept-trak-stamp # written by requirements.sh into the environment when everything is installed

# One variable for each field of Settings: TOP_K=20 becomes --top-k=20.
SETTING_VARIABLES=(
    PROMPT TARGET_CONCEPTS NEGATIVE_PROMPTS NEGATIVE_PROMPT SEED RECIPE SCOPE QUERY_FORM
    LAYER F NFE DDIM_INVERSION NORMALIZE BLOCKS PROJ_TYPE PROJ_DIM PROJ_SEED PROJ_MASK PROJ_BACKEND
    TRAIN_GUIDANCE_SCALE CONCEPT_GUIDANCE_SCALE GEN_GUIDANCE_SCALE GEN_NUM_INFERENCE_STEPS ETA EPOCHS BATCH_SIZE
    DAMPING SEARCH CANDIDATES TOP_K RENDER_LEASTK WEIGHTS FORCE_RECOMPUTE_CONCEPT_GRAD NUM_QUERIES METHODS
    SD_MODEL_PATH LORA_PATH FIT_MODEL_PATH SOURCE_DIR DATA_DIR NUM_TRAIN GRAD_DIR STORE_CACHE RESULTS_DIR NUM_SPLIT SHARDS REPAIR DTYPE STORE_DTYPE DEVICE GPU_ID GPU_IDS EXECUTOR NUM_CPUS NUM_GPUS PIECE_ROWS TASK_RETRIES MAX_MEMORY
    TASK_IDX TASK_JSON TI_MODEL_PATH TI_WEIGHT_NAME RETRAIN TRUTH_DIR REPLAY_STEPS
    CONCEPT BASE_PROMPT RATIO SELECTION GRANULARITY OPERATOR STRENGTH SCORE_SEEDS SPARE SPARE_WEIGHT EDITS EXPORT JUDGED TARGET_UA MIN_RETENTION
    LISTEN_HOST LISTEN_PORT QUEUE_LENGTH ANSWER_WAIT BODY_TIMEOUT BODY_BYTES
    PROTOCOL PROMPTS_FILE SEEDS_PER_PROMPT CLASSIFIER CLIP_MODEL ALEXNET_PATH FEATURE_MODEL REAL_DIR
)

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# flags_from_env VAR...: fills the array FLAGS. A variable set to the empty string is passed on: an empty negative prompt is
# a value. The form --name=value keeps values that begin with a dash.
flags_from_env() {
    local name flag
    FLAGS=()
    for name in "$@"; do
        [ -n "${!name+set}" ] || continue
        flag=$(printf '%s' "$name" | tr 'A-Z_' 'a-z-')
        FLAGS+=("--$flag=${!name}")
    done
}

sha256_tool() { command -v sha256sum >/dev/null && echo sha256sum || echo "shasum -a 256"; }

# What the environment must have been built from. The path is part of it: the package is installed in editable form.
wanted_stamp() {
    { echo "$ROOT"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/environment.yml"; } | $(sha256_tool) | cut -d' ' -f1
}

env_prefix() { dirname "$(dirname "$1")"; }

stamp_is_current() { [ "$(cat "$1/$STAMP_NAME" 2>/dev/null)" = "$(wanted_stamp)" ]; }

# The folder of the conda environment, or nothing. Asking conda takes a second, so look where it keeps environments first.
conda_prefix() {
    local conda=${CONDA_EXE:-$(command -v conda || true)} folder base='' IFS=:
    [ -z "$conda" ] || base=$(dirname "$(dirname "$conda")")
    for folder in ${CONDA_ENVS_PATH:-} ${base:+"$base/envs"} "${HOME:-}/.conda/envs"; do
        [ ! -x "$folder/$ENV_NAME/bin/python" ] || { echo "$folder/$ENV_NAME"; return; }
    done
    [ -z "$conda" ] || "$conda" env list 2>/dev/null | awk -v name="$ENV_NAME" '$1 == name { sub(/^[^/]*/, ""); print; exit }'
}

# -I leaves out the current folder and the user's site-packages, so only an installed package counts.
has_package() {
    "$1" -I -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("concept_trak", "torch"))))' 2>/dev/null
}

# Print the interpreter to use, activated or not; fail if there is none. PYTHON_BIN decides alone; then ENV_KIND; else it is the
# first of: the active environment if the package is installed in it, this repository's .venv, the conda environment.
find_python() {
    local prefix
    if [ -n "${PYTHON_BIN:-}" ]; then
        command -v "$PYTHON_BIN" || die "PYTHON_BIN=$PYTHON_BIN is not an executable; set PYTHON_BIN to a Python with concept-trak installed"
        return
    fi
    if [ -z "${ENV_KIND:-}" ]; then
        for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
            if [ -x "$prefix/bin/python" ] && has_package "$prefix/bin/python"; then
                echo "$prefix/bin/python"
                return
            fi
        done
    fi
    if [ "${ENV_KIND:-venv}" = venv ] && [ -x "$ROOT/.venv/bin/python" ]; then
        echo "$ROOT/.venv/bin/python"
        return
    fi
    [ "${ENV_KIND:-conda}" = conda ] || return 1
    prefix=$(conda_prefix)
    [ -n "$prefix" ] && [ -x "$prefix/bin/python" ] && echo "$prefix/bin/python"
}

# Set PYTHON, after running requirements.sh if the environment is missing or was built from other requirements. An active
# environment without our stamp is the user's own: it is used as it is.
ensure_env() {
    local prefix kind=${ENV_KIND:-}
    if PYTHON=$(find_python); then
        [ -z "${PYTHON_BIN:-}" ] || return 0
        prefix=$(env_prefix "$PYTHON")
        if stamp_is_current "$prefix"; then return 0; fi
        if [ -z "$kind" ] && [ ! -e "$prefix/$STAMP_NAME" ]; then
            case "$prefix" in "${VIRTUAL_ENV:-}" | "${CONDA_PREFIX:-}") return 0 ;; esac
        fi
        kind=conda
        [ "$prefix" != "$ROOT/.venv" ] || kind=venv
    elif [ -n "${PYTHON_BIN:-}" ]; then
        exit 1 # find_python has said why
    fi
    ENV_KIND=$kind bash "$ROOT/requirements.sh" >&2 # the standard output belongs to the verb
    PYTHON=$(find_python) || die "no environment after requirements.sh; set PYTHON_BIN to a Python with concept-trak installed"
}

# run_module MODULE ARGUMENT...: of this checkout, whatever the working folder is and holds. in_place=exec: instead of the
# shell, so that a signal to the script reaches the program.
in_place=''
run_module() { $in_place "$PYTHON" -I -u "$ROOT/concept_trak/isolated.py" "$@"; }

# run_cli VERB ARGUMENT...: the command line.
run_cli() { CONCEPT_TRAK_FROM_ENV=1 run_module concept_trak "$@"; }

# run_verb VERB ARGUMENT...: set-up, then the verb with the caller's variables. Arguments come last and so win over variables.
run_verb() {
    ensure_env
    flags_from_env "${SETTING_VARIABLES[@]}"
    # An empty array counts as unset for `set -u` in bash before 4.4 (macOS has 3.2), hence the ${...+...} form.
    run_cli "$1" ${FLAGS[@]+"${FLAGS[@]}"} "${@:2}"
}

# Variables of the benchmarks of labelled pictures alone.
LABELLED_VARIABLES=(
    STAGE QUICK SEEDS REFERENCE_SEEDS NETWORKS SAMPLES COUNT STEPS SIZE SHAPES COLORS HELD_OUT ATTRIBUTES SOURCE LDS_SUBSETS
    TRUTH_STEPS WORK
)

# labelled BENCHES ARGUMENT...: set-up, then the verb of that name with the caller's variables.
labelled() {
    ensure_env
    flags_from_env "${SETTING_VARIABLES[@]}" "${LABELLED_VARIABLES[@]}"
    run_cli labelled --benches "$1" ${FLAGS[@]+"${FLAGS[@]}"} "${@:2}"
}
