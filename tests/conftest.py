"""Eight CPU devices for every test; nothing of one test leaks into another."""

import os

import jax

# Most of the tests' time would be LLVM's, on programs that run once. For their processes, too.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
