#!/usr/bin/env bash
# Inversion on two machines of eight cards that share this folder; what is lost is started again.
# On both: HOST=<the first one's address> CKPT=<best.pt> bash recipes/infer_two_nodes.sh
set -euo pipefail
DATA=${DATA:-data_openfwi/test}
torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 --rdzv_backend=c10d --rdzv_endpoint="$HOST:29500" \
  --rdzv_id=openfwi infer.py --ckpt="$CKPT" --input="$DATA" --tta --refine=inversion --out=submission.csv
