#!/usr/bin/env bash
# One machine, N processes:  NPROC=8 CONFIG=configs/decode.toml ./scripts/train.sh --set train.lr=3e-4
# NPROC: default one for each GPU, else 1.  MAX_RESTARTS: how often to start all ranks again from the last whole state after one died.
set -euo pipefail
: "${CONFIG:?name the recipe: CONFIG=configs/….toml $0}"
PYTHON="${PYTHON:-python}"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" --max_restarts="${MAX_RESTARTS:-0}" \
  -m synapse_nb.train.launch "$CONFIG" "$@"
