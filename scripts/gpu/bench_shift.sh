#!/usr/bin/env bash
# Four H200s, bare: shift parallelism against its two layouts alone, and its correctness. Some 25
# minutes; name parts to run only those:
#     bench_shift.sh OUT [correctness all_reduce shift tp4 sp4 dp4 swiftkv 70b]
# The programs of a part's first benchmark serve its second. JSON goes to OUT; tables are printed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benchmarks/results/h200-x4}
parts=("${@:2}")
((${#parts[@]})) || parts=(correctness all_reduce shift tp4 sp4 dp4 swiftkv 70b)
mkdir -p "$out"
# NVLink multicast stays off.
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
python=${PYTHON:-python3}
# The first start would measure the threshold, which takes a minute more.
threshold=${THRESHOLD:-512}
engine="--model benchmarks/configs/llama-3.1-8b --load-format dummy --max-model-len 8448 --max-num-seqs ${SEQS:-64} --max-num-batched-tokens 8192"

quiet() { grep -v -e '━' -e ' uses ' -e cuda_timer; }
offline() { # name, options of benchmarks/offline.py
    timeout 220 "$python" benchmarks/offline.py $engine --repeats 2 \
        --batches 1 16 64 --prefill 8 8192 --throughput 256 --out "$out/8b_$1.json" "${@:2}" 2>&1 | quiet
}
# The same bursts for every way to use four GPUs.
traffic() { # name, options of benchmarks/traffic.py
    timeout 160 "$python" benchmarks/traffic.py $engine --seconds 30 --rate 5 --burst 60 \
        --out "$out/traffic_$1.json" "${@:2}" 2>&1 | quiet
}
both() { offline "$@" && traffic "$@"; }

for part in "${parts[@]}"; do
    echo "== $part ($SECONDS s)"
    case $part in
    correctness)
        timeout 200 env JAX_DISABLE_MOST_OPTIMIZATIONS=0 "$python" -m pytest -p no:cacheprovider -q \
            tests/test_weight_views.py tests/kernels/test_all_reduce.py tests/engine/test_shift_parallel.py \
            -k "views or view or another or measured or kernel_is" 2>&1 | tail -n 3
        ;;
    all_reduce) timeout 120 "$python" benchmarks/all_reduce.py --out "$out/all_reduce.json" ;;
    shift) both shift --ulysses-sequence-parallel-size 4 --shift-parallel-threshold "$threshold" ;;
    tp4) both tp4 --tensor-parallel-size 4 ;;
    sp4) both sp4 --ulysses-sequence-parallel-size 4 --no-shift-parallel ;;
    dp4) traffic dp4 --data-parallel-size 4 ;;
    swiftkv)
        timeout 220 "$python" benchmarks/swiftkv.py --load-format dummy --repeats 2 --throughput 128 \
            --ulysses-sequence-parallel-size 4 --out "$out/swiftkv.json" 2>&1 | quiet
        ;;
    70b)
        timeout 400 "$python" benchmarks/offline.py --model benchmarks/configs/llama-3.1-70b \
            --load-format dummy --max-model-len 8448 --max-num-seqs 64 --max-num-batched-tokens 8192 \
            --tensor-parallel-size 2 --ulysses-sequence-parallel-size 2 \
            --shift-parallel-threshold "$threshold" --repeats 1 --batches 1 16 64 --prefill 8 8192 \
            --out "$out/70b_shift.json" 2>&1 | quiet
        ;;
    *) echo "no part is called $part" >&2 ;;
    esac
done
