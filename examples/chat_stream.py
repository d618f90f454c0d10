"""Print an answer while it is written: python examples/chat_stream.py [MODEL]."""

import sys

from arctic_jax import LLM, SamplingParams

MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Why is the sky blue?"},
]


def main(model: str = "smollm2-135m-instruct") -> None:
    llm = LLM(model, max_num_seqs=4, max_num_batched_tokens=64)
    shown = ""
    for output in llm.stream(MESSAGES, SamplingParams(temperature=0, max_tokens=64)):
        text = output.outputs[0].text  # the whole answer so far
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
