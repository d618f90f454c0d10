"""`arctic_jax.pallas_kernels`: the kernels, one folder an operation.

The files are in the folder pallas_kernels/ at the top of the repository.
"""

import os

if __name__ != "arctic_jax.pallas_kernels":
    raise ImportError("import arctic_jax.pallas_kernels, not pallas_kernels")
__path__ = [os.path.realpath(path) for path in __path__]  # tracebacks name the real file
