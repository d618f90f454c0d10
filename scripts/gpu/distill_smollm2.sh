#!/usr/bin/env bash
# One H200, bare: a SwiftKV student of SmolLM2-135M-Instruct, in less than 8 minutes.
# The model answers prompts, the student is distilled on the answers, and both are compared on
# answers that were held back. $OUT gets swiftkv.safetensors (bfloat16), the logs and the figures.
#
#   OUT=/tmp/student scripts/gpu/distill_smollm2.sh PROMPTS.jsonl [MORE.jsonl ...]
#
# Smaller or other runs through the environment; the defaults are the recipe of docs/swiftkv.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?the folder for the results}"
(($#)) || { echo "give files of prompts, one JSON object a line" >&2; exit 2; }
model=${MODEL:-smollm2-135m-instruct}
layers=${LAYERS:-15} group=${GROUP:-1}
answers=${ANSWERS:-2} limit=${LIMIT:-20000} max_tokens=${MAX_TOKENS:-512}
epochs=${EPOCHS:-4} steps=${STEPS:-} batch=${BATCH:-16} length=${LENGTH:-1024} rate=${RATE:-5e-3}
schedule=${SCHEDULE:-cosine} temperature=${TEMPERATURE:-2}
# The hidden states of this model have a few huge entries: at 1.0 their error would be 70 times the
# divergence at the beginning.
hidden_weight=${HIDDEN_WEIGHT:-0.01}
dtype=${DTYPE:-bfloat16} evaluation_dtype=${EVALUATION_DTYPE:-float32}
held_back_every=${HELD_BACK_EVERY:-50}
generation_s=${GENERATION_S:-210} distillation_s=${DISTILLATION_S:-220}
work=${WORK:-$OUT/work} # text, checkpoints and the whole student: more than is worth keeping
mkdir -p "$OUT" "$work"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
arctic() { "${PYTHON:-python3}" -m arctic_jax.serving.cli "$@"; }
step() { echo "== $1 ($SECONDS s)"; }

# Each part goes on where an earlier call of this script left it.
if [[ ! -s $work/text.jsonl ]]; then
    step "answers to prompts"
    timeout "$generation_s" bash -c "$(declare -f arctic); arctic \"\$@\"" _ \
        swiftkv generate "$@" --model "$model" --dtype "$dtype" --seed 0 --max-model-len 2048 \
        --limit "$limit" --answers "$answers" --max-tokens "$max_tokens" --temperature 0.7 \
        --held-back-every "$held_back_every" --held-back "$work/held_back.jsonl" \
        --out "$work/text.jsonl"
fi
step "distillation"
timeout --signal=INT "$distillation_s" bash -c "$(declare -f arctic); arctic \"\$@\"" _ \
    swiftkv distill "$model" "$work/text.jsonl" "$work/run" \
    --num-key-value-layers "$layers" --key-value-group-size "$group" \
    --epochs "$epochs" ${steps:+--steps "$steps"} --batch-size "$batch" --max-length "$length" \
    --learning-rate "$rate" --schedule "$schedule" --hidden-weight "$hidden_weight" \
    --temperature "$temperature" \
    --dtype "$dtype" --save-every 200 || echo "stopped early: what was learned so far is compared"
cp "$work/run/swiftkv.safetensors" "$work/run/log.jsonl" "$work/run/settings.json" "$OUT/"
[[ -f $work/run/loss.png ]] && cp "$work/run/loss.png" "$OUT/"
[[ -d $work/run/model ]] || arctic swiftkv convert "$model" "$work/run/model" --dtype "$dtype" \
    --num-key-value-layers "$layers" --key-value-group-size "$group" \
    --parameters "$work/run/swiftkv.safetensors"
step "comparison on what was held back"
compared=()
for file in "$work"/held_back*.jsonl; do compared+=(--data "$file"); done
arctic evaluate --model "$work/run/model" --teacher "$model" "${compared[@]}" \
    --dtype "$evaluation_dtype" --max-length "$length" --out "$OUT/evaluation.json"
if [[ -n ${GSM8K:-} ]]; then
    step "GSM8K, both models"
    for name in student teacher; do
        path=$model
        [[ $name == student ]] && path=$work/run/model
        arctic evaluate --model "$path" --gsm8k "$GSM8K" --dtype "$dtype" --max-model-len 2048 \
            --limit "${PROBLEMS:-400}" --out "$OUT/gsm8k_$name.json"
    done
fi
step "done"
