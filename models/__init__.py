"""`arctic_jax.models`: the model architectures, one file each.

The files are in the folder models/ at the top of the repository.
"""

import os

if __name__ != "arctic_jax.models":
    raise ImportError("import arctic_jax.models, not models")
__path__ = [os.path.realpath(path) for path in __path__]  # tracebacks name the real file
