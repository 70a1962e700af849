#!/bin/bash
#SBATCH --job-name=bayestune-table
#SBATCH --array=1-8
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=table-%A-%a.log

# Fill a table on a Slurm cluster. Submit it from a folder that all nodes share, in an environment that has bayestune
# (sbatch passes the environment on), with the arguments of `bayestune table`:
#
#   sbatch examples/slurm_table.sh table1 --data DIR --model MODEL --config table.yaml
#
# All elements of the array get the same arguments; each takes the next run that no other element is making. Ask for at
# most as many elements as there are runs left: an element without a run waits for the others, and keeps its GPU.
# With checkpoint_steps in the settings file, a run that is requeued, or stopped 5 minutes before the time limit,
# resumes from a checkpoint. After a time limit, submit the script again.
set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
srun bayestune table "$@"
