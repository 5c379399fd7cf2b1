#!/usr/bin/env bash
# Answers a prompt on the nodes of a Slurm job, one rank and one GPU a stage.
#
#   sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh
#   MODEL=/models/bloom sbatch --nodes 1 --gpus-per-node 4 --ntasks-per-node 4 launch/slurm.sh
#   DRY_RUN=1 bash launch/slurm.sh              prints the command and runs nothing
#
# Slurm copies a batch script, so submit it from the folder of the repository, or set REPOSITORY.
#SBATCH --job-name=dist_int8
#SBATCH --output=dist_int8-%j.log
#SBATCH --time=01:00:00
#SBATCH --exclusive
set -euo pipefail

REPOSITORY="${REPOSITORY:-${SLURM_SUBMIT_DIR:-$PWD}}"
MODEL="${MODEL:-bigscience/bloom}"        # folder or hub id, the same on every node
DEVICE="${DEVICE:-cuda}"                  # cuda or cpu
PROMPT="${PROMPT:-The capital of France is}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-64}"
CONFIG="${CONFIG:-}"                      # a YAML file of settings, see configs/
PYTHON="${PYTHON:-.venv/bin/python}"
MASTER_PORT="${MASTER_PORT:-29500}"
DRY_RUN="${DRY_RUN:-0}"

cd "$REPOSITORY"
if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
fi
export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT

# srun starts the same shell once a task; there Slurm's numbers become a launcher's.
# shellcheck disable=SC2016
rank='export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}"
exec "$@"'
command=(srun --kill-on-bad-exit=1 bash -c "$rank" rank
    "$PYTHON" launch/generate.py --model "$MODEL" --device "$DEVICE"
    --prompt "$PROMPT" --max-new-tokens "$MAX_NEW_TOKENS")
if [[ -n "$CONFIG" ]]; then command+=(--config "$CONFIG"); fi
command+=("$@")

printf '%q ' "${command[@]}" >&2
printf '\n' >&2
if [[ "$DRY_RUN" == 1 ]]; then exit 0; fi
exec "${command[@]}"
