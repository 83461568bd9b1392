#!/usr/bin/env bash
# Two machines of eight cards. On both: HOST=<the first one's address> NODE=0 (the other: NODE=1) bash recipes/two_nodes.sh
set -euo pipefail
DATA=${DATA:-data_openfwi}
torchrun --nnodes=2 --node_rank="$NODE" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint="$HOST:29500" \
  --rdzv_id=openfwi train.py --data_root="$DATA" --name=nodes --batch_size=16 --lr=8e-4 --epochs=60 --resume=auto
