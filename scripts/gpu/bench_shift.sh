#!/usr/bin/env bash
# Four H200s, bare: shift parallelism against its two layouts alone, and its correctness.
# JSON goes to the folder given as the first argument; tables are printed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benchmarks/results/h200-x4}
mkdir -p "$out"
# NVLink multicast stays off.
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
python=${PYTHON:-python3}
model=benchmarks/configs/llama-3.1-8b

bench() { # name, options of benchmarks/offline.py
    echo "== $1 ($SECONDS s)"
    timeout 200 "$python" benchmarks/offline.py --model $model --load-format dummy \
        --max-model-len 8448 --max-num-seqs 256 --repeats 1 --out "$out/$1.json" "${@:2}" 2>&1 |
        grep -v -e '━' -e ' uses '
}

echo "== correctness"
timeout 200 "$python" -m pytest -p no:cacheprovider -q tests/test_weight_views.py \
    tests/engine/test_shift_parallel.py -k "views or view or another or measured" 2>&1 | tail -n 3
all="--batches 1 16 64 --prefill 8 8192 --throughput 256"
bench 8b_sp4_shift --ulysses-sequence-parallel-size 4 $all
bench 8b_tp4 --tensor-parallel-size 4 $all
bench 8b_sp4 --ulysses-sequence-parallel-size 4 --no-shift-parallel $all

# The same bursts for every way to use four GPUs.
traffic() { # name, options of benchmarks/traffic.py
    echo "== traffic, $1 ($SECONDS s)"
    timeout 200 "$python" benchmarks/traffic.py --model $model --load-format dummy \
        --seconds 40 --rate 5 --burst 60 --out "$out/traffic_$1.json" "${@:2}" 2>&1 |
        grep -v -e '━' -e ' uses '
}
traffic shift --ulysses-sequence-parallel-size 4
traffic tp4 --tensor-parallel-size 4
traffic sp4 --ulysses-sequence-parallel-size 4 --no-shift-parallel
traffic dp4 --data-parallel-size 4
