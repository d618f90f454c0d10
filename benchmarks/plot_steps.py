"""Draw docs/step_time.svg: measured decode steps against the floor that memory bandwidth sets.

    python benchmarks/plot_steps.py benchmarks/results/h200/steps_*/step_time.json

Each file is what `scripts/gpu/step_time.py` wrote. The floor is the bytes a step must read (weights
and cached keys and values) over 4.3 TB/s, the fastest copy measured on an H200. Needs the extra
`plots`.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

BYTES_PER_S = 4.3e12


def main() -> None:
    """Draw what the files hold."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    documents = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    documents = [d for d in documents if d["model"].endswith("8b")]
    for document in sorted(documents, key=lambda d: d["context"]):
        batches = [row["batch"] for row in document["rows"]]
        cached = document["cache_bytes_per_token"] * document["context"]
        floor = [(document["weight_bytes"] + b * cached) / BYTES_PER_S * 1e3 for b in batches]
        steps = [row["whole"] for row in document["rows"]]
        (line,) = axes.plot(batches, steps, marker="o", label=f"context {document['context']:,}")
        axes.plot(batches, floor, linestyle="--", color=line.get_color())
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="sequences",
        ylabel="ms a decode step (dashed: floor)",
        title="Llama-3.1-8B shape, bfloat16, one H200",
    )
    axes.set_xticks(batches, map(str, batches))
    axes.set_yticks([4, 6, 8, 12, 16, 24], map(str, [4, 6, 8, 12, 16, 24]))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    plt.rcParams["svg.hashsalt"] = "arctic_jax"
    figure.savefig(Path(__file__).parents[1] / "docs" / "step_time.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
