#!/bin/bash
#SBATCH --job-name=bayestune-table
#SBATCH --array=1-8
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=table-%A-%a.log

# Fill a table on a Slurm cluster, from a folder that all nodes share and with the arguments of `bayestune table`:
#
#   sbatch examples/slurm_table.sh table1 --data data --model minilm --config examples/minilm.yaml
#
# All elements of the array get the same arguments: each takes the next run that no other is making. With
# checkpoint_steps in the settings file, a requeued element resumes its run instead of training it again.
set -euo pipefail
srun bayestune table "$@"
