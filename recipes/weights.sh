#!/usr/bin/env bash
# The network in weights/: from nothing, on synthetic maps of all ten families, without a real one. Given again, the
# command goes on where it was stopped. An epoch is 40 steps of 16 samples, half a minute on a CPU core: choose as many
# as your time allows. A CPU keeps the gathers it simulates (0.7 MB each) and uses them again; a card makes new ones.
# On eight cards: torchrun --nproc_per_node=8 train.py …
set -euo pipefail
python train.py --name=weights --resume=auto --arch=seisnext --classify_family --data_root=data_weights --synth_per_family=80 --split=share --val_share=0.2 --online=0.9375 --online_maps=new --online_pairs=16000 --optimizer=muon --warmup_steps=100 --batch_size=16 --epochs=600 --constant_share=0.9 --ema_decay=0.998 --flip_p=0 --stretch_p=0.25 --workers=1 --val_every=25
run=$(ls -d runs/*-weights | tail -1)
python bench.py accuracy --ckpt="$run/best.pt" --json="$run/accuracy.json"
python -m training.publish --ckpt="$run/best.pt" --out=weights/seisnext.safetensors --accuracy="$run/accuracy.json"
