"""Find the text that is nearest to a question: python examples/embed.py [MODEL]."""

import sys

from arctic_jax import LLM

TEXTS = ["The cat sits outside.", "A man plays the guitar.", "The new film is awesome."]


def main(model: str = "minilm-l6") -> None:
    llm = LLM(model)
    rows = llm.embed(TEXTS)  # numpy float32 [texts, dimensions], each of length 1
    scores = rows @ llm.embed("Somebody makes music.")[0]
    for score, text in sorted(zip(scores, TEXTS, strict=True), reverse=True):
        print(f"{score:.3f}  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
