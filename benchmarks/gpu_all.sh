#!/usr/bin/env bash
# Runs what needs a GPU, most valuable first: its tests, the speed of a 7B shape, and the comparisons on a language
# model and on MiniLM, as parallel processes. It skips records that exist, so the same command continues after an
# interruption.
#
#     DATA=folder RUNS=folder benchmarks/gpu_all.sh          # WORKERS=15 PYTHON=python3
#     DRY=1 DATA=folder RUNS=folder benchmarks/gpu_all.sh    # only print the commands
#
# Processes take turns on the GPU unless NVIDIA's multi-process service runs: nvidia-cuda-mps-control -d. With it and 15
# processes on an H100, a cell on SmolLM2 took one to three minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} WORKERS=${WORKERS:-15}
: "${DATA:?the folder of the data sets}" "${RUNS:?a folder for trained runs}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
out=results/bench
mkdir -p "$RUNS"

alone() { # the record of a benchmark of speed
    [ -e "$out/$1.json" ] && return
    local command=("${@:2}" --device cuda --json "$out/$1.json")
    if [ -n "${DRY:-}" ]; then echo "${command[*]}"; else "$PYTHON" "${command[@]}"; fi
}
together() { # commands on stdin
    if [ -n "${DRY:-}" ]; then cat; else xargs -P "$WORKERS" -I{} bash -c "{} || true"; fi
}
cells() { # of decoder.py: variants
    for task in arc_easy openbookqa; do for variant in "$@"; do for seed in 1 2 3; do
        file=results/decoder/$task-$variant-seed$seed.json
        [ -e "$file" ] || echo "$PYTHON benchmarks/decoder.py --data $DATA --runs $RUNS --task $task --variants $variant --seeds $seed"
    done; done; done
}

[ -n "${DRY:-}" ] || "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/inference/test_gpu.py tests/training/test_memory.py
alone train_llama7b-4x300 benchmarks/train_step.py --shape llama7b-4x300 --pairs 20
for shape in 1x100 4x300; do alone predict_llama7b-$shape benchmarks/predict.py --shape llama7b-$shape; done
cells mle | together
cells ensemble dropout laplace blob_tempered blob tfb ivon blob_paper blob_wide | together
for task in openbookqa arc_easy arc_challenge rte boolq; do for seed in 1 2 3; do
    echo "$PYTHON benchmarks/widths.py --data $DATA --tasks $task --seeds $seed"
done; done | together
alone train_llama7b-4x300-checkpointing benchmarks/train_step.py --shape llama7b-4x300 --checkpointing --pairs 20
alone trainer_llama7b-4x300 benchmarks/trainer_step.py --shape llama7b-4x300 --pairs 20
for shape in 1x50 1x300 4x50 4x100; do alone predict_llama7b-$shape benchmarks/predict.py --shape llama7b-$shape; done
