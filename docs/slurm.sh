#!/bin/bash
#SBATCH --job-name=distoptim
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
# Where a lost host puts the job back into the queue, it goes on from its checkpoint.
#SBATCH --requeue
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 bash slurm_worker.sh
