#!/usr/bin/env bash
# Answers a prompt on the GPUs (or CPU stages) of one machine or several, started by torchrun.
#
#   MODEL=/models/bloom NUM_STAGES=4 PROMPT="Hello" bash launch/torchrun.sh
#   NUM_NODES=2 ENDPOINT=node-0:29500 MODEL=/models/bloom bash launch/torchrun.sh   on every machine
#   DRY_RUN=1 bash launch/torchrun.sh           prints the command and runs nothing
#
# Further flags of `dist-int8 generate` go after the script: bash launch/torchrun.sh --chat --json
set -euo pipefail
export PYTHONSAFEPATH=1  # no rank imports Python files of the working directory
cd "$(dirname "$0")/.."

MODEL="${MODEL:-bigscience/bloom}"        # folder or hub id
NUM_STAGES="${NUM_STAGES:-4}"             # per machine; each is one rank, and on cuda one GPU
DEVICE="${DEVICE:-cuda}"                  # cuda or cpu
PROMPT="${PROMPT:-The capital of France is}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-64}"
CONFIG="${CONFIG:-}"                      # a YAML file of settings, see configs/
MASTER_PORT="${MASTER_PORT:-29500}"       # with a single machine
NUM_NODES="${NUM_NODES:-1}"
ENDPOINT="${ENDPOINT:-}"                  # host:port where the machines meet
JOB="${JOB:-dist_int8}"                   # the same on all machines
DRY_RUN="${DRY_RUN:-0}"

command=(torchrun --nproc-per-node "$NUM_STAGES")
if [[ "$NUM_NODES" == 1 ]]; then
    command+=(--master-addr 127.0.0.1 --master-port "$MASTER_PORT")
else
    command+=(--nnodes "$NUM_NODES" --rdzv-backend c10d --rdzv-id "$JOB"
        --rdzv-endpoint "${ENDPOINT:?torchrun.sh: ENDPOINT must be host:port, got nothing; name node 0}")
fi
command+=(
    launch/generate.py --model "$MODEL" --device "$DEVICE"
    --prompt "$PROMPT" --max-new-tokens "$MAX_NEW_TOKENS")
if [[ -n "$CONFIG" ]]; then command+=(--config "$CONFIG"); fi
command+=("$@")

printf '%q ' "${command[@]}" >&2
printf '\n' >&2
if [[ "$DRY_RUN" == 1 ]]; then exit 0; fi
exec "${command[@]}"
