#!/usr/bin/env bash
# One H200, bare: every figure of docs/performance.md in less than 8 minutes.
# JSON goes to the folder given as the first argument; tables are printed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benchmarks/results/h200}
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
python=${PYTHON:-python3}
llama=benchmarks/configs/llama-3.1-8b

step() { echo "== $1 ($SECONDS s)"; }
quiet() { grep -v -e '━' -e ' uses '; }

step "Llama-3.1-8B shape: latency, prefill, a long prompt beside 32 streams, throughput"
timeout 240 "$python" benchmarks/offline.py --model $llama --load-format dummy \
    --max-model-len 33000 --max-num-seqs 256 --max-num-batched-tokens 8192 --repeats 1 \
    --batches 1 16 64 256 --prefill 8 8192 --stall 32 32768 --throughput 512 \
    --out "$out/offline_llama-3.1-8b.json" 2>&1 | quiet
step "the same engine again, its programs on disk"
timeout 60 "$python" benchmarks/offline.py --model $llama --load-format dummy \
    --max-model-len 33000 --max-num-seqs 256 --max-num-batched-tokens 8192 --batches \
    --out "$out/warm_start_llama-3.1-8b.json" 2>&1 | quiet
step "decode steps by batch and context"
for context in 1024 8192; do
    timeout 100 "$python" scripts/gpu/step_time.py --batches 1 4 16 64 --context $context \
        --max-model-len 8448 --out "$out/steps_$context" 2>&1 | quiet
done
for model in qwen3-0.6b smollm2-135m; do
    step "$model"
    timeout 60 "$python" scripts/gpu/step_time.py --model benchmarks/configs/$model --batches 1 \
        --out "$out/steps_$model" 2>&1 | quiet
done
step "kernels"
timeout 200 "$python" benchmarks/kernels.py --out "$out/kernels.json" 2>&1
step "done"
