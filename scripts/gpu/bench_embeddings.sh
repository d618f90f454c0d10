#!/usr/bin/env bash
# One H200, bare: every figure of docs/embeddings.md in less than 4 minutes.
#
#   scripts/gpu/bench_embeddings.sh TOKENIZER [OUT]
#
# TOKENIZER is a folder with BERT's tokenizer.json, such as that of all-MiniLM-L6-v2; the weights of
# arctic-embed-m's shape are random. JSON goes to OUT; tables are printed.
set -uo pipefail
cd "$(dirname "$0")/../.."
tokenizer=${1:?a folder with the tokenizer}
out=${2:-benchmarks/results/h200}
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
step() { echo "== $1 ($SECONDS s)"; }
quiet() { grep -v -e '━' -e ' uses '; }

step "kernels"
for kernel in segment_attention add_layer_norm; do
    timeout 60 "$python" benchmarks/kernels.py --filter $kernel --out "$out/$kernel.json" 2>&1
done
step "parts of a layer"
timeout 90 "$python" scripts/gpu/embedding_parts.py --out "$out/embedding_parts.json" 2>&1
step "layers, kernel by kernel"
timeout 90 "$python" scripts/gpu/embedding_trace.py --out "$out/embedding_trace" 2>&1 | quiet
for implementation in xla mosaic_gpu; do
    step "from strings to rows, $implementation"
    timeout 90 "$python" benchmarks/embeddings.py --model benchmarks/configs/arctic-embed-m \
        --load-format dummy --tokenizer "$tokenizer" --implementation $implementation \
        --lengths 50 512 0 --texts --tokens 400000 1000000 --repeats 3 --latency 200 \
        --output "$out/embeddings_$implementation.json" 2>&1 | quiet
done
step "done"
