#!/usr/bin/env bash
# One H200, bare: every figure of docs/embeddings.md in less than 4 minutes.
#
#   scripts/gpu/bench_embeddings.sh TOKENIZER [OUT]
#
# SHORT=1: only from strings to rows, by the default implementation, in less than a minute.
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

strings_to_rows() { # name of the result, then options
    local name=$1
    shift
    step "from strings to rows, $name"
    timeout 90 "$python" benchmarks/embeddings.py --model benchmarks/configs/arctic-embed-m \
        --load-format dummy --tokenizer "$tokenizer" --texts --repeats 3 \
        --output "$out/embeddings_$name.json" "$@" 2>&1 | quiet
}

if [ -n "${SHORT:-}" ]; then
    strings_to_rows arctic-embed-m --lengths 50 512 0 --tokens 1000000 --latency 200
    exit
fi
step "kernels"
for kernel in segment_attention add_layer_norm; do
    timeout 60 "$python" benchmarks/kernels.py --filter $kernel --out "$out/$kernel.json" 2>&1
done
step "parts of a layer"
timeout 90 "$python" scripts/gpu/embedding_parts.py --out "$out/embedding_parts.json" 2>&1
step "layers, kernel by kernel"
timeout 90 "$python" scripts/gpu/embedding_trace.py --tokenizer "$tokenizer" \
    --out "$out/embedding_trace" 2>&1 | quiet
cases=(--lengths 50 512 0 --tokens 400000 1000000 --latency 200)
strings_to_rows arctic-embed-m "${cases[@]}"
strings_to_rows arctic-embed-m_xla "${cases[@]}" --implementation xla
step "done"
