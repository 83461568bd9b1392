#!/usr/bin/env bash
# Kaggle's two T4s, internet off: the competition's 10,000 training samples, then the submission.
# Add a data set with the backbone's weights (.safetensors or .pth) and name its file as PRETRAINED.
set -euo pipefail
DATA=${DATA:-/kaggle/input/waveform-inversion}
WEIGHTS=--pretrained=false
if [ -n "${PRETRAINED:-}" ]; then WEIGHTS=--pretrained="$PRETRAINED"; fi
python train.py --data_root="$DATA/train_samples" --name=kaggle "$WEIGHTS" --precision=float16 \
  --batch_size=16 --lr=3e-4 --epochs=40 --workers=2 --resume=auto
# on both cards
python infer.py --ckpt="$(ls -d runs/*-kaggle | tail -1)/best.pt" --input="$DATA/test" --tta --out=submission.csv
