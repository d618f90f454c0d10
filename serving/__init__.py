"""`arctic_jax.serving`, the folder serving/: the command line and the asynchronous engine."""

import os

if __name__ != "arctic_jax.serving":
    raise ImportError("import arctic_jax.serving, not serving")
__path__ = [os.path.realpath(path) for path in __path__]  # tracebacks name the real file
