"""Draw docs/embeddings.svg: tokens a second of embedding models, from strings to rows.

    python benchmarks/plot_embeddings.py benchmarks/results/h200/embeddings_mosaic_gpu.json [...]

Each file is what `benchmarks/embeddings.py` wrote; for each length the best of its cases is drawn,
and how much of the time the device works. Needs the extra `plots`.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """Draw what the files hold."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    documents = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    width = 0.8 / len(documents)
    names: list[str] = []
    for number, document in enumerate(documents):
        best: dict[str, dict] = {}
        for case in document["cases"]:
            name = str(case["length"])
            best[name] = max(case, best.get(name, case), key=lambda c: c["tokens_per_second"])
        names = list(best)
        places = [i + number * width for i in range(len(best))]
        label = f"{Path(document['model']).name}, {document['implementation'] or 'as chosen'}"
        speeds = [case["tokens_per_second"] / 1e6 for case in best.values()]
        axes.bar(places, speeds, 0.9 * width, label=label)
        device = [case["tokens"] / case["milliseconds"]["device"] / 1e3 for case in best.values()]
        axes.plot(places, device, "k_", markersize=18)
    axes.plot([], [], "k_", label="the device alone")
    axes.set_xticks([i + (len(documents) - 1) * width / 2 for i in range(len(names))], names)
    axes.set(xlabel="tokens of a text", ylabel="million tokens a second")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    plt.rcParams["svg.hashsalt"] = "arctic_jax"
    figure.savefig(Path(__file__).parents[1] / "docs" / "embeddings.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
