"""The command `arctic-jax embed`: texts from a file to vectors in a file."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from arctic_jax.config import LoadConfig
from arctic_jax.serving.options import stderr

if TYPE_CHECKING:
    import numpy as np

MODEL = "minilm-l6"
OUTPUTS = (".npy", ".parquet")


def embed(
    input: Annotated[
        Path,
        typer.Option(help="A .jsonl file of texts, or of objects with one; else a text a line."),
    ],
    output: Annotated[Path, typer.Option(help="The file to write: .npy or .parquet.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="An alias, a folder, or a hub id.")
    ] = MODEL,
    field: Annotated[str, typer.Option(help="Of an object: the text.")] = "text",
    prompt_name: Annotated[
        str | None, typer.Option(help="A prompt of the model's: query, document, ...")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Keep so many (Matryoshka embeddings).")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate/--no-truncate", help="Cut long texts, or refuse them.")
    ] = True,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="A text that cannot be embedded gets NaN.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto is the fastest here.")
    ] = LoadConfig.dtype,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest text; by default what the model was made for.")
    ] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one batch.")] = None,
) -> None:
    """Turn texts into vectors, a row each, in their order."""
    if output.suffix not in OUTPUTS:
        raise ValueError(f"--output must end with one of {OUTPUTS}, got {str(output)!r}")
    if output.suffix == ".parquet":
        _pyarrow()  # better now than after the work
    texts = list(read_texts(input, field))
    from arctic_jax import LLM

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    start = time.perf_counter()
    rows = llm.embed(
        texts,
        on_error="nan" if skip_errors else "raise",
        prompt_name=prompt_name,
        dimensions=dimensions,
        truncate=truncate,
    )
    seconds = time.perf_counter() - start
    write_rows(output, rows)
    import numpy as np

    failed = np.isnan(rows[:, 0]).sum()
    said = f"{len(rows)} vectors of {rows.shape[1]} in {seconds:.2f} s"
    stderr.print(Text(said + (f", {failed} of them NaN" if failed else ""), "dim"))


def read_texts(path: Path, field: str) -> Iterator[Any]:
    """Yield what there is to embed; of a JSON line that is none of these, the line's value.

    Raises:
        ValueError: a line is not JSON, or an object without the field; the message has its number.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if path.suffix != ".jsonl":
                yield line.rstrip("\n")
                continue
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                yield value[field] if isinstance(value, dict) else value
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}") from error


def write_rows(path: Path, rows: "np.ndarray") -> None:
    """Write `[texts, dimensions]`: `.npy` as it is, `.parquet` as the column "embedding"."""
    if path.suffix == ".npy":
        import numpy as np

        np.save(path, rows)
        return
    pa, parquet = _pyarrow()
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    parquet.write_table(pa.table({"embedding": column}), path)


def _pyarrow() -> Sequence[Any]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = "writing Parquet needs pyarrow: pip install 'arctic-jax[parquet]'"
        raise ValueError(message) from error
    return pyarrow, pyarrow.parquet
