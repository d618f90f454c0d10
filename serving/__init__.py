"""`arctic_jax.serving`: the command line and the asynchronous engine.

The files are in the folder serving/ at the top of the repository.
"""

import os

if __name__ != "arctic_jax.serving":
    raise ImportError("import arctic_jax.serving, not serving")
__path__ = [os.path.realpath(path) for path in __path__]  # tracebacks name the real file
