#!/usr/bin/env bash
# One H200, bare: what the server costs. 64 streams of 1,024 tokens in and 128 out, Llama-3.1-8B
# shape: the engine alone, then the same requests through the endpoint.
#
#   scripts/gpu/bench_server.sh OUT TOKENIZER
#
# TOKENIZER: a folder with a tokenizer.json of 128,256 tokens, for the text of the answers.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?a folder for the results} tokenizer=${2:?a folder with tokenizer.json}
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
arctic() { "${PYTHON:-python3}" -m arctic_jax.serving.cli "$@"; }
model="--model benchmarks/configs/llama-3.1-8b --load-format dummy --tokenizer $tokenizer"
engine="--max-model-len 2048 --max-num-seqs 64 --max-num-batched-tokens 8192"
port=8763

# shellcheck disable=SC2086  # several options
timeout 300 bash -c "$(declare -f arctic); arctic bench throughput $model $engine \
    --input-len 1024 --output-len 128 --num-prompts 256 --output-json $out/server_offline.json" 2>&1 |
    grep -v -e '━' -e ' uses '
# shellcheck disable=SC2086
arctic serve $model $engine --port $port --served-model-name llama >"$out/server.log" 2>&1 &
server=$!
trap 'kill -INT $server 2>/dev/null' EXIT
for _ in $(seq 200); do
    curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
    kill -0 $server 2>/dev/null || { tail -n 20 "$out/server.log"; exit 1; }
    sleep 1
done
measure() { # name, options
    echo "== $1 ($SECONDS s)"
    timeout 120 bash -c "$(declare -f arctic); arctic bench serve --base-url http://127.0.0.1:$port \
        --random-input-len 1024 --random-output-len 128 --ignore-eos --temperature 0 \
        --num-warmups 4 --save-result --save-detailed --result-dir $out \
        --result-filename $1.json ${*:2}" 2>&1 | grep -v '━'
}
measure server_64_streams --num-prompts 256 --max-concurrency 64 --seed 1
measure server_one_wave --num-prompts 64 --max-concurrency 64 --seed 2
curl -s "http://127.0.0.1:$port/metrics" >"$out/server_metrics.txt"
