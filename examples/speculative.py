"""Fewer steps for text that repeats itself: python examples/speculative.py [MODEL].

Suffix decoding guesses from what was said before; the model verifies, so the answers stay the same.
"""

import sys

from arctic_jax import LLM, SamplingParams

PROMPT = "Repeat: red green blue yellow. red green blue yellow. red green blue yellow. red"


def main(model: str = "smollm2-135m-instruct") -> None:
    suffix = {"method": "suffix", "num_speculative_tokens": 8}
    llm = LLM(model, max_num_seqs=4, max_num_batched_tokens=64, speculative_config=suffix)
    greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    for turn in ("at first", "asked again"):  # the second time the answer itself is known
        [output] = llm.generate(PROMPT, greedy)
        tokens, metrics = len(output.outputs[0].token_ids), output.metrics
        print(f"{turn}: {tokens} tokens, {metrics.num_accepted_tokens} of them guessed, ", end="")
        print(f"{tokens / (tokens - metrics.num_accepted_tokens):.1f} tokens a step")


if __name__ == "__main__":
    main(*sys.argv[1:])
