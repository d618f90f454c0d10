"""A model whose prompt tokens leave half way: python examples/swiftkv.py [MODEL].

It is used like any other; what differs is how much work a prompt is (docs/swiftkv.md).
"""

import sys

from arctic_jax import LLM, SamplingParams

QUESTIONS = ["What is gravity?", "What is the capital of Italy?"]


def main(model: str = "smollm2-135m-instruct-swiftkv") -> None:
    llm = LLM(model, max_num_seqs=4, max_num_batched_tokens=64)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=32))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question} ({len(output.prompt_token_ids)} tokens) -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
