#!/usr/bin/env bash
# One H200, bare: a speculator for SmolLM2-135M-Instruct, in less than 8 minutes.
# The model answers prompts, the speculator is trained on the answers, and the engine counts which
# of its drafts are accepted on prompts that it was not trained on. $OUT gets speculator/ (config
# and bfloat16 weights), the logs and the figures.
#
#   OUT=/tmp/speculator scripts/gpu/train_speculator.sh PROMPTS.jsonl [MORE.jsonl ...]
#
# TEXT: conversations to train on, if there are some; nothing is generated then.
# EVALUATE: files of prompts to evaluate on, instead of what was held back.
# Smaller or other runs through the environment; the defaults are the recipe of
# docs/speculative-decoding.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?the folder for the results}"
[[ -n ${TEXT:-} ]] || (($#)) || { echo "give files of prompts, one JSON object a line" >&2; exit 2; }
model=${MODEL:-smollm2-135m-instruct} dtype=${DTYPE:-bfloat16}
answers=${ANSWERS:-1} limit=${LIMIT:-12000} max_tokens=${MAX_TOKENS:-384}
temperature=${TEMPERATURE:-0.5} held_back_every=${HELD_BACK_EVERY:-50}
kind=${KIND:-lstm} inner=${INNER:-1024} heads=${HEADS:-3} share=${SHARE---share}
epochs=${EPOCHS:-10} steps=${STEPS:-} batch=${BATCH:-32} length=${LENGTH:-1024} rate=${RATE:-1e-3}
evaluated=${EVALUATED:-} evaluation_tokens=${EVALUATION_TOKENS:-256}
generation_s=${GENERATION_S:-180} training_s=${TRAINING_S:-210}
work=${WORK:-$OUT/work} # text and checkpoints: more than is worth keeping
mkdir -p "$OUT" "$work"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
arctic() { "${PYTHON:-python3}" -m arctic_jax.serving.cli "$@"; }
within() { timeout --signal="$1" "$2" bash -c "$(declare -f arctic); arctic \"\$@\"" _ "${@:3}"; }
step() { echo "== $1 ($SECONDS s)"; }

# Each part goes on where an earlier call of this script left it.
text=${TEXT:-$work/text.jsonl}
if [[ ! -s $text ]]; then
    step "answers to prompts"
    within TERM "$generation_s" speculator generate "$@" --model "$model" --dtype "$dtype" \
        --seed 0 --max-model-len 2048 --limit "$limit" --answers "$answers" \
        --max-tokens "$max_tokens" --temperature "$temperature" \
        --held-back-every "$held_back_every" --held-back "$work/held_back.jsonl" --out "$text"
fi
step "training"
within INT "$training_s" speculator train "$model" "$text" "$work/run" \
    --kind "$kind" --inner-size "$inner" --n-predict "$heads" $share \
    --epochs "$epochs" ${steps:+--steps "$steps"} --batch-size "$batch" --max-length "$length" \
    --learning-rate "$rate" --dtype "$dtype" --save-every 500 \
    || echo "stopped early: what was learned so far is evaluated"
cp -r "$work/run/speculator" "$work/run/log.jsonl" "$work/run/settings.json" "$OUT/"
[[ -f $work/run/loss.png ]] && cp "$work/run/loss.png" "$OUT/"
step "acceptance"
# shellcheck disable=SC2086  # several files
arctic speculator evaluate "$OUT/speculator" ${EVALUATE:-$work/held_back.jsonl} --model "$model" \
    --dtype "$dtype" --max-model-len 2048 ${evaluated:+--limit "$evaluated"} \
    --max-tokens "$evaluation_tokens" --out "$OUT/acceptance.json"
step "done"
