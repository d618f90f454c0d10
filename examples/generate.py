"""Answer several prompts at once: python examples/generate.py [MODEL]."""

import sys

from arctic_jax import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "One, two, three,"]


def main(model: str = "smollm2-135m-instruct") -> None:
    # Small limits: few programs to compile.
    llm = LLM(model, max_num_seqs=4, max_num_batched_tokens=64)
    greedy = SamplingParams(temperature=0, max_tokens=16)
    for output in llm.generate(PROMPTS, greedy):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

    # Three answers to one prompt; the seed makes them the same in every run.
    drawn = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=16)
    [output] = llm.generate("Once upon a time", drawn)
    for answer in output.outputs:
        print(f"{answer.index}: {answer.text!r} ({answer.finish_reason})")


if __name__ == "__main__":
    main(*sys.argv[1:])
