#!/usr/bin/env bash
# One H200, bare: what speculation gains, and what a step that verifies costs. Some 11 minutes with
# all parts; name some to run only those: bench_speculation.sh OUT DATA [hybrid agents plain steps]
# DATA is laid out as benchmarks/speculation.py says. JSON goes to OUT; tables are printed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-benchmarks/results/h200} data=${2:?the folder with prompts}
parts=("${@:3}")
((${#parts[@]})) || parts=(hybrid agents plain steps)
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

quiet() { grep -v -e '━' -e ' uses '; }
bench() { # name, options of benchmarks/speculation.py
    timeout 330 "$python" benchmarks/speculation.py --data "$data" --out "$out/$1.json" \
        --speculator smollm2-135m-instruct-speculator "${@:2}" 2>&1 | quiet
}

for part in "${parts[@]}"; do
    echo "== $part ($SECONDS s)"
    case $part in
    hybrid) bench speculation_hybrid --methods hybrid --workloads gsm8k humaneval ;;
    agents) bench speculation_agents --methods hybrid --workloads agent ;;
    plain) bench speculation_suffix --methods suffix --workloads gsm8k agent ;;
    steps)
        timeout 200 "$python" scripts/gpu/step_time.py --batches 1 16 64 --drafts 0 3 7 15 \
            --out "$out/verify_steps" 2>&1 | quiet
        ;;
    *) echo "no part is called $part" >&2 ;;
    esac
done
