#!/usr/bin/env bash
# A laptop without a card: 400 simulated maps of each of the ten families, an hour of training, a prediction.
set -euo pipefail
python synth.py --out=data_cpu --families=all --n_per_family=400 --seed=0
python train.py --preset=seisnext --name=cpu --data_root=data_cpu --split=share --batch_size=8 --epochs=12 --workers=1
python infer.py --ckpt="$(ls -d runs/*-cpu | tail -1)/best.pt" --input=data_cpu/Style_A --truth=data_cpu/Style_A --tta
