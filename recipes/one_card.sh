#!/usr/bin/env bash
# One workstation card: our network on OpenFWI's files, with simulated maps in place of every second sample.
set -euo pipefail
DATA=${DATA:-data_openfwi}
python train.py --preset=seisnext --data_root="$DATA" --online=0.5 --batch_size=64 --epochs=60 --resume=auto
