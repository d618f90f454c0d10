"""Ask a server with OpenAI's client: python examples/openai_client.py [URL].

The server: arctic-jax serve smollm2-135m-instruct
"""

import sys

from openai import OpenAI


def main(url: str = "http://localhost:8000") -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "Why is the sky blue?"}]

    answer = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=32, temperature=0
    )
    print(answer.choices[0].message.content, answer.usage.total_tokens)

    stream = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=32, temperature=0, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
