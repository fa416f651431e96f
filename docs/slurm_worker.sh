#!/bin/bash
# One worker of slurm.sh; srun sets the rank and the number of workers.
exec distoptim train --init "tcp://$HEAD:${PORT:-29500}" --world-size "$SLURM_NTASKS" --rank "$SLURM_PROCID" \
    --folder run --auto-resume ${TRAIN:-}
