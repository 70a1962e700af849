#!/usr/bin/env bash
# Makes results/bench/*.json; run it on an idle machine. PYTHON=... picks the interpreter, and DEVICE=cuda uses a GPU.
# sampling_free.json needs BLoB runs, RUNS="folder ..." DATA=folder; generate_smollm2.json needs a run on SmolLM2,
# CAUSAL_RUN=folder DATA=folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
out=results/bench
if [ "${DEVICE:-cpu}" = cuda ]; then
    "$PYTHON" benchmarks/train_step.py --device cuda --shape llama7b-4x300 --json $out/train_llama7b-4x300.json
    "$PYTHON" benchmarks/trainer_step.py --device cuda --shape llama7b-4x300 --json $out/trainer_llama7b-4x300.json
    "$PYTHON" benchmarks/train_step.py --device cuda --shape llama7b-4x300 --checkpointing --json $out/train_llama7b-4x300-checkpointing.json
    for shape in 1x50 1x100 1x300 4x50 4x100 4x300; do
        "$PYTHON" benchmarks/predict.py --device cuda --shape llama7b-$shape --json $out/predict_llama7b-$shape.json
    done
    exit
fi
for shape in llama-4x128 minilm-8x128; do
    "$PYTHON" benchmarks/train_step.py --device cpu --shape $shape --json $out/train_$shape.json
    "$PYTHON" benchmarks/trainer_step.py --device cpu --shape $shape --pairs 60 --json $out/trainer_$shape.json
done
for shape in llama-1x100 llama-4x100 minilm-1x4x40 minilm-8x4x64; do
    "$PYTHON" benchmarks/predict.py --device cpu --shape $shape --json $out/predict_$shape.json
done
"$PYTHON" benchmarks/chunks.py --json $out/chunks.json
"$PYTHON" benchmarks/scaling.py --json $out/scaling.json
"$PYTHON" benchmarks/command.py --json $out/command.json
"$PYTHON" benchmarks/start.py --json $out/start.json
if [ -n "${RUNS:-}" ]; then
    # shellcheck disable=SC2086
    "$PYTHON" benchmarks/sampling_free.py $RUNS --data "$DATA" --json $out/sampling_free.json
fi
if [ -n "${CAUSAL_RUN:-}" ]; then
    "$PYTHON" benchmarks/generate.py --run "$CAUSAL_RUN" --data "$DATA" --json $out/generate_smollm2.json
fi
"$PYTHON" benchmarks/performance.py
