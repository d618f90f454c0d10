#!/usr/bin/env bash
# On a machine with an H200: the correctness tests, then the first figures of the engine.
# Results go to the folder given as the first argument.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benchmarks/results/h200}
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
python=${PYTHON:-python3}
model=benchmarks/configs/llama-3.1-8b

timeout 240 "$python" -m pytest -p no:cacheprovider -q tests/engine/test_core.py 2>&1 | tail -n 15
timeout 100 "$python" -m pytest -p no:cacheprovider -q -m gpu tests/kernels 2>&1 | tail -n 5
timeout 240 "$python" benchmarks/offline.py --model $model --load-format dummy \
    --max-model-len 2048 --max-num-seqs 64 --max-num-batched-tokens 8192 \
    --batches 1 16 64 --repeats 1 --profile "$out/trace" \
    --out "$out/offline_llama-3.1-8b.json" 2>&1 | grep -v '━'
"$python" scripts/gpu/trace_summary.py "$out/trace" && rm -rf "$out/trace"
