#!/usr/bin/env bash
# Two CPU processes (gloo) train a tiny network together: does distributed training work on this machine?  About ten seconds, no data.
set -euo pipefail
PYTHON="${PYTHON:-python}"
RECIPE="$(mktemp)"
trap 'rm -f "$RECIPE"' EXIT
echo 'n_epochs = 2' > "$RECIPE"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= TORCH_CPP_LOG_LEVEL=ERROR
OUT="$("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 -m synapse_nb.train.launch --live "$RECIPE" --target synapse_nb.train.launch:smoke "$@" 2>&1)" || { echo "$OUT"; exit 1; }
echo "$OUT" | grep -v '^@step'
grep -q '2 rank(s)' <<< "$OUT"
[ "$(grep -c '^@row' <<< "$OUT")" = 2 ]
echo "two ranks trained together: ok"
