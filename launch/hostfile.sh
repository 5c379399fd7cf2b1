#!/usr/bin/env bash
# Answers a prompt on several machines, started by deepspeed over ssh from a hostfile.
#
#   HOSTFILE=launch/hostfile.example MODEL=/models/bloom bash launch/hostfile.sh
#   INCLUDE="node-0:0,1@node-1:2" bash launch/hostfile.sh    some GPUs of some machines
#   DRY_RUN=1 bash launch/hostfile.sh           prints the command and runs nothing
#
# Needs passwordless ssh and pdsh, and the repository, .venv and model at the same paths on every
# machine. The arguments pass through a shell there, which expands $ and backquotes in a prompt.
# Without ssh, run it on every machine with NO_SSH=1 and NODE_RANK=0, 1, ... in the file's order.
set -euo pipefail
export PYTHONSAFEPATH=1  # no rank imports Python files of the working directory
cd "$(dirname "$0")/.."

HOSTFILE="${HOSTFILE:-launch/hostfile.example}"   # lines "name slots=GPUs"
MODEL="${MODEL:-bigscience/bloom}"        # folder or hub id
DEVICE="${DEVICE:-cuda}"                  # cuda or cpu
PROMPT="${PROMPT:-The capital of France is}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-64}"
CONFIG="${CONFIG:-}"                      # a YAML file of settings, see configs/
MASTER_PORT="${MASTER_PORT:-29500}"
INCLUDE="${INCLUDE:-}"                    # hosts and slots in deepspeed's syntax; all by default
SSH_PORT="${SSH_PORT:-}"                  # if not in the ssh config
NO_SSH="${NO_SSH:-0}"
NODE_RANK="${NODE_RANK:-0}"
DRY_RUN="${DRY_RUN:-0}"

# Ranks meet on the first machine of the file unless MASTER_ADDR names another.
MASTER_ADDR="${MASTER_ADDR:-$(awk '!/^[[:space:]]*(#|$)/ {print $1; exit}' "$HOSTFILE")}"

# deepspeed logs to stdout, where the answer goes.
command=(deepspeed --quiet --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT")
if [[ -n "$INCLUDE" ]]; then command+=(--include "$INCLUDE"); fi
if [[ "$NO_SSH" == 1 ]]; then
    command+=(--no_ssh --node_rank "$NODE_RANK")
else
    command+=(--launcher pdsh)
    if [[ -n "$SSH_PORT" ]]; then command+=(--ssh_port "$SSH_PORT"); fi
fi
command+=(launch/generate.py --model "$MODEL" --device "$DEVICE"
    --prompt "$PROMPT" --max-new-tokens "$MAX_NEW_TOKENS")
if [[ -n "$CONFIG" ]]; then command+=(--config "$CONFIG"); fi
command+=("$@")

printf '%q ' "${command[@]}" >&2
printf '\n' >&2
if [[ "$DRY_RUN" == 1 ]]; then exit 0; fi
# Otherwise deepspeed warns on stdout where there is no GPU.
if [[ "$DEVICE" == cpu ]]; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
exec "${command[@]}"
