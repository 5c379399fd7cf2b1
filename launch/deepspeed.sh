#!/usr/bin/env bash
# Answers a prompt on the GPUs (or CPU stages) of one machine, started by deepspeed.
#
#   MODEL=/models/bloom NUM_STAGES=4 PROMPT="Hello" bash launch/deepspeed.sh
#   DRY_RUN=1 bash launch/deepspeed.sh          prints the command and runs nothing
#
# Further flags of `dist-int8 generate` go after the script: bash launch/deepspeed.sh --chat --json
set -euo pipefail
export PYTHONSAFEPATH=1  # no rank imports Python files of the working directory
cd "$(dirname "$0")/.."

MODEL="${MODEL:-bigscience/bloom}"        # folder or hub id
NUM_STAGES="${NUM_STAGES:-4}"             # each is one rank, and on cuda one GPU
DEVICE="${DEVICE:-cuda}"                  # cuda or cpu
PROMPT="${PROMPT:-The capital of France is}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-64}"
CONFIG="${CONFIG:-}"                      # a YAML file of settings, see configs/
MASTER_PORT="${MASTER_PORT:-29500}"
DRY_RUN="${DRY_RUN:-0}"

# deepspeed logs to stdout, where the answer goes.
command=(deepspeed --quiet --num_gpus "$NUM_STAGES" --master_addr 127.0.0.1 --master_port "$MASTER_PORT"
    launch/generate.py --model "$MODEL" --device "$DEVICE"
    --prompt "$PROMPT" --max-new-tokens "$MAX_NEW_TOKENS")
if [[ -n "$CONFIG" ]]; then command+=(--config "$CONFIG"); fi
command+=("$@")

printf '%q ' "${command[@]}" >&2
printf '\n' >&2
if [[ "$DRY_RUN" == 1 ]]; then exit 0; fi
# Otherwise deepspeed warns on stdout where there is no GPU.
if [[ "$DEVICE" == cpu ]]; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
exec "${command[@]}"
