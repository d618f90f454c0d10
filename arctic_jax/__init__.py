"""arctic_jax: LLM inference in JAX, with the names most users need.

`LLM` is loaded on first use, so that `import arctic_jax.pallas_kernels` costs no engine.
"""

from typing import TYPE_CHECKING

from arctic_jax.config import EngineConfig as EngineConfig
from arctic_jax.request import RequestOutput as RequestOutput
from arctic_jax.request import SamplingParams as SamplingParams
from arctic_jax.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

if TYPE_CHECKING:
    from arctic_jax.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Load `LLM` when it is first asked for."""
    if name == "LLM":
        from arctic_jax.llm import LLM

        return LLM
    raise AttributeError(f"module 'arctic_jax' has no attribute {name!r}")
