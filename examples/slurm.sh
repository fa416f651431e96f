#!/bin/bash
# One worker on each of four machines, under SLURM:
#
#     sbatch examples/slurm.sh train.py ARGUMENTS
#
#SBATCH --job-name=distoptim
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
# Where a lost machine puts the job back into the queue, it begins anew, or where your script goes on from.
#SBATCH --requeue
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=1 --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" "$@"
