#!/usr/bin/env bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00 --requeue
# Inversion on as many nodes as the job has; submitted again it goes on. CKPT=<best.pt> sbatch recipes/slurm.sh
set -euo pipefail
DATA=${DATA:-data_openfwi/test}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max_restarts=3 --rdzv_backend=c10d \
  --rdzv_endpoint="$HOST:29500" --rdzv_id="$SLURM_JOB_ID" infer.py --ckpt="$CKPT" --input="$DATA" --tta \
  --refine=inversion --out=submission.csv
