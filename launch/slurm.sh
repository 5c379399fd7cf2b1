#!/usr/bin/env bash
# Answers a prompt on the nodes of a Slurm job; each stage is one rank with one GPU.
#
#   sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh
#   MODEL=/models/bloom sbatch --nodes 1 --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh
#   DRY_RUN=1 bash launch/slurm.sh              prints the command and runs nothing
#
# Ranks meet on the first node, at a port derived from the job's number. MASTER_ADDR and MASTER_PORT
# override both, and GLOO_SOCKET_IFNAME names the network interface.
# Slurm copies a batch script, so submit it from the repository's folder, or set REPOSITORY.
#SBATCH --job-name=dist_int8
#SBATCH --output=dist_int8-%j.log
#SBATCH --time=01:00:00
#SBATCH --exclusive
set -euo pipefail
export PYTHONSAFEPATH=1  # no rank imports Python files of the working directory

REPOSITORY="${REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}}"
MODEL="${MODEL:-bigscience/bloom}"        # folder or hub id, the same on every node
DEVICE="${DEVICE:-cuda}"                  # cuda or cpu
PROMPT="${PROMPT:-The capital of France is}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-64}"
CONFIG="${CONFIG:-}"                      # a YAML file of settings, see configs/
PYTHON="${PYTHON:-.venv/bin/python}"
DRY_RUN="${DRY_RUN:-0}"

cd "$REPOSITORY"
# Each task finds its rank and the first node, where all meet, in srun's environment.
command=(srun --kill-on-bad-exit=1 "$PYTHON" launch/generate.py --model "$MODEL" --device "$DEVICE"
    --prompt "$PROMPT" --max-new-tokens "$MAX_NEW_TOKENS")
if [[ -n "$CONFIG" ]]; then command+=(--config "$CONFIG"); fi
command+=("$@")

printf '%q ' "${command[@]}" >&2
printf '\n' >&2
if [[ "$DRY_RUN" == 1 ]]; then exit 0; fi
exec "${command[@]}"
