#!/usr/bin/env bash
# Eight cards of one machine: the public baseline on all of OpenFWI. train.py starts a process a card by itself;
# torchrun restarts it after a failure as well.
set -euo pipefail
DATA=${DATA:-data_openfwi}
torchrun --standalone --nproc_per_node=8 --max_restarts=3 train.py --data_root="$DATA" --name=eight \
  --batch_size=16 --lr=4e-4 --epochs=60 --workers=6 --resume=auto
