#!/usr/bin/env bash
# Ask a server with curl: examples/curl.sh [URL]. The server: arctic-jax serve smollm2-135m-instruct
set -euo pipefail
url=${1:-http://localhost:8000}

echo "models:"
curl --fail --silent --show-error "$url/v1/models"

echo; echo "a completion:"
curl --fail --silent --show-error "$url/v1/completions" -H 'content-type: application/json' \
    -d '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'

echo; echo "a chat, as a stream of events:"
curl --fail --silent --show-error --no-buffer "$url/v1/chat/completions" \
    -H 'content-type: application/json' -d '{
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 8, "temperature": 0, "stream": true
    }'
