"""What every command shares: the engine's options, and how errors are shown. No heavy imports."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from arctic_jax.config import CacheConfig, LoadConfig, ParallelConfig, SchedulerConfig
from arctic_jax.structured_outputs import StructuredOutputsConfig

if TYPE_CHECKING:
    from arctic_jax import LLM

PANEL = "Engine options"

stdout = Console(soft_wrap=True, highlight=False)
"""For results; whole lines, so that a pipe gets what a terminal shows."""
stderr = Console(stderr=True, soft_wrap=True, highlight=False)
"""For everything else: errors, hints, timings."""


def _option(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL)


def engine_options(
    model: Annotated[
        str, _option("--model", "-m", help="An alias, a folder, a GGUF file, or a hub id.")
    ] = LoadConfig.model,
    revision: Annotated[str | None, _option(help="Branch, tag or commit on the hub.")] = None,
    tokenizer: Annotated[
        str | None, _option(help="A folder or hub id, if the model's own is not wanted.")
    ] = None,
    dtype: Annotated[
        str, _option(help="float32, bfloat16, float16; auto is float32 on a CPU.")
    ] = LoadConfig.dtype,
    load_format: Annotated[
        str, _option(help="auto; dummy gives random weights, for benchmarks.")
    ] = LoadConfig.load_format,
    max_model_len: Annotated[
        int | None, _option(help="Longest sequence; by default what the model was made for.")
    ] = None,
    max_num_seqs: Annotated[int | None, _option(help="Requests that run at once.")] = None,
    max_num_batched_tokens: Annotated[
        int | None, _option(help="Tokens of one step, prompts and decode together.")
    ] = None,
    max_num_mixed_tokens: Annotated[
        int | None, _option(help="Tokens of one step in which answers are streamed.")
    ] = None,
    num_scheduler_steps: Annotated[
        int | None, _option(help="Tokens that a step draws for each answer while nobody waits.")
    ] = None,
    scheduling_policy: Annotated[
        str, _option(help="fcfs; priority lets lower priorities go first.")
    ] = SchedulerConfig.scheduling_policy,
    max_logprobs: Annotated[
        int, _option(help="Most alternatives of a log-probability.")
    ] = SchedulerConfig.max_logprobs,
    block_size: Annotated[
        int, _option(help="Tokens of one block of the key/value cache.")
    ] = CacheConfig.block_size,
    num_blocks: Annotated[
        int | None, _option(help="Blocks of the cache; by default what the memory holds.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, _option(help="Share of a GPU's memory to use.")
    ] = CacheConfig.gpu_memory_utilization,
    prefix_caching: Annotated[
        bool,
        _option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            "--prefix-caching/--no-prefix-caching",
            help="Keep blocks of shared prefixes.",
        ),
    ] = CacheConfig.enable_prefix_caching,
    data_parallel_size: Annotated[
        int, _option("--data-parallel-size", "-dp", help="Engines, each on devices of its own.")
    ] = ParallelConfig.data_parallel_size,
    tensor_parallel_size: Annotated[
        int, _option("--tensor-parallel-size", "-tp", help="Devices that split the weights.")
    ] = ParallelConfig.tensor_parallel_size,
    ulysses_sequence_parallel_size: Annotated[
        int, _option(help="Devices that split the tokens.")
    ] = ParallelConfig.ulysses_sequence_parallel_size,
    shift_parallel: Annotated[
        bool,
        _option(
            "--enable-shift-parallel/--no-enable-shift-parallel",
            "--shift-parallel/--no-shift-parallel",
            help="With Ulysses: steps of few tokens split the weights over all devices.",
        ),
    ] = ParallelConfig.enable_shift_parallel,
    shift_parallel_threshold: Annotated[
        int | None, _option(help="Most tokens of such a step; by default measured.")
    ] = None,
    disable_custom_all_reduce: Annotated[
        bool,
        _option(
            "--disable-custom-all-reduce",
            help="Have NCCL sum the results of few tokens over the devices, too.",
        ),
    ] = ParallelConfig.disable_custom_all_reduce,
    nnodes: Annotated[
        int, _option(help="Machines that the devices of one engine are spread over.")
    ] = ParallelConfig.nnodes,
    node_rank: Annotated[
        int, _option(help="Which of them this one is; all but 0 are --headless.")
    ] = ParallelConfig.node_rank,
    master_addr: Annotated[
        str, _option(help="Address of node 0, on which it listens for the others.")
    ] = ParallelConfig.master_addr,
    master_port: Annotated[int, _option(help="Its port.")] = ParallelConfig.master_port,
    speculative_config: Annotated[
        str | None,
        _option(
            help='Drafts: JSON, such as {"method": "suffix"}; see docs/speculative-decoding.md.'
        ),
    ] = None,
    max_grammar_size: Annotated[
        int, _option(help="Most characters of a schema or grammar that a request brings.")
    ] = StructuredOutputsConfig.max_grammar_size,
    max_schema_depth: Annotated[
        int, _option(help="Most objects and arrays within each other in a schema.")
    ] = StructuredOutputsConfig.max_schema_depth,
    grammar_time_limit: Annotated[
        float, _option(help="Seconds for compiling a grammar.")
    ] = StructuredOutputsConfig.grammar_time_limit,
    mask_time_limit: Annotated[
        float, _option(help="Seconds for finding out which tokens a grammar allows next.")
    ] = StructuredOutputsConfig.mask_time_limit,
    grammar_cache_size: Annotated[
        int, _option(help="Compiled grammars that are kept.")
    ] = StructuredOutputsConfig.grammar_cache_size,
    implementation: Annotated[
        str | None, _option(help="Of every kernel: xla or mosaic_gpu; by default the best here.")
    ] = LoadConfig.implementation,
    step_log: Annotated[
        str | None, _option(help="Write layout, tokens and time of each step to this file.")
    ] = None,
    seed: Annotated[
        int | None, _option(help="Of sampling, of random prompts and of dummy weights.")
    ] = None,
) -> dict[str, Any]:
    """Return the options under the names `LLM(...)` takes."""
    keywords = dict(locals())
    keywords["enable_prefix_caching"] = keywords.pop("prefix_caching")
    keywords["enable_shift_parallel"] = keywords.pop("shift_parallel")
    if seed is None:
        del keywords["seed"]
    return keywords


def show_log() -> None:
    """Show what the engine has to say, such as how long loading took, between progress bars."""
    from rich.logging import RichHandler

    log = logging.getLogger("arctic_jax.engine")
    log.addHandler(RichHandler(console=stderr, show_level=False, show_time=False, show_path=False))
    log.setLevel(logging.INFO)
    log.propagate = False  # libraries put handlers of their own at the root


def make_llm(engine: dict[str, Any]) -> "LLM":
    """Build the engine, with a progress bar for download, load and compile."""
    from arctic_jax import LLM

    return LLM(**engine)


def command[**P, R](app: typer.Typer, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as a command of `app`, with `--debug` and its errors shown as one line.

    A parameter called `engine` stands for all of `engine_options` and receives its result.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function).parameters
        shared = inspect.signature(engine_options).parameters if "engine" in own else {}
        debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback.")]
        parameters = {
            **{n: p for n, p in own.items() if n != "engine"},
            **shared,
            "debug": inspect.Parameter(
                "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug
            ),
        }

        @functools.wraps(function)
        def run(*, debug: bool, **values: Any) -> R:
            arguments = {n: v for n, v in values.items() if n in own}
            if shared:
                arguments["engine"] = engine_options(**{n: values[n] for n in shared})
            try:
                return function(**arguments)  # type: ignore[call-arg]
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except (ValueError, OSError) as error:  # what arctic_jax.errors derives from, and files
                if debug:
                    raise
                _show(error)
                raise typer.Exit(2) from None

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in keyword_only}
        # Dashes or underscores, as vLLM has it.
        settings = {"token_normalize_func": lambda option: option.replace("_", "-")}
        app.command(name, context_settings=settings)(run)
        return function

    return register


def _show(error: Exception) -> None:
    message = " ".join(str(error).split()) or type(error).__name__
    stderr.print(Text(f"error: {message}", style="bold red"))
