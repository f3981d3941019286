#!/bin/bash
# One rank of a job: what torch.distributed wants to know, from what Slurm knows. srun starts it once for each task.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}  # 8(x2) is eight on each of two nodes
exec "$@"
