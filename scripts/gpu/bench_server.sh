#!/usr/bin/env bash
# One H200, bare: what the server costs. 64 streams of 1,024 tokens in and 128 out, Llama-3.1-8B
# shape: the engine alone, then the same requests through the endpoint, with prompts in steps of
# different sizes.
#
#   scripts/gpu/bench_server.sh OUT TOKENIZER [TOKENS ...]
#
# TOKENIZER: a folder with a tokenizer.json of 128,256 tokens, for the text of the answers.
# TOKENS: of a step with streams, `--max-num-mixed-tokens`.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?a folder for the results} tokenizer=${2:?a folder with tokenizer.json}
shift 2
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
python=${PYTHON:-python3}
arctic=("$python" -m arctic_jax.serving.cli)
engine=(--model benchmarks/configs/llama-3.1-8b --load-format dummy --tokenizer "$tokenizer"
    --max-model-len 8448 --max-num-seqs 64 --max-num-batched-tokens 8192)
port=8763 server=
trap 'kill -INT $server 2>/dev/null' EXIT
quiet() { grep -v -e '━' -e ' uses '; }

echo "== the engine alone ($SECONDS s)"
timeout 150 "${arctic[@]}" bench throughput "${engine[@]}" --input-len 1024 --output-len 128 \
    --num-prompts 256 --output-json "$out/server_none.json" 2>&1 | quiet

measure() { # name, options
    echo "== $1 ($SECONDS s)"
    timeout 120 "${arctic[@]}" bench serve --base-url "http://127.0.0.1:$port" \
        --random-input-len 1024 --random-output-len 128 --ignore-eos --temperature 0 \
        --num-warmups 4 --save-detailed --result-dir "$out" --result-filename "$1.json" "${@:2}" \
        2>&1 | quiet
}
for tokens in "${@:-2048}"; do
    "${arctic[@]}" serve "${engine[@]}" --port $port --served-model-name llama \
        --max-num-mixed-tokens "$tokens" >"$out/server_$tokens.log" 2>&1 &
    server=$!
    for _ in $(seq 400); do
        curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
        kill -0 $server 2>/dev/null || { tail -n 20 "$out/server_$tokens.log"; exit 1; }
        sleep 0.5
    done
    measure "server_${tokens}_64_streams" --num-prompts 256 --max-concurrency 64 --seed 1
    measure "server_${tokens}_one_wave" --num-prompts 64 --max-concurrency 64 --seed 2
    kill -INT $server
    wait $server 2>/dev/null
done
