"""Parameters as the engine holds them, in Orbax checkpoints. Host only.

`arctic-jax convert` writes a directory with the model's config and tokenizer, a manifest, and one
Orbax checkpoint for each layer: so that neither side holds more than a layer on the host, and that
there is progress to show. Orbax reads each device's rows straight into the array's sharding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from arctic_jax.errors import CheckpointError
from arctic_jax.weights import ParameterSpec

MANIFEST = "arctic_jax.json"
VERSION = 1
_PARAMETERS = "parameters"


@dataclass(frozen=True)
class Manifest:
    """What a directory holds, and for whom.

    Attributes:
        model_type: of the model's config.
        dtype: of every parameter.
        num_devices: P, for which weights were fused.
        num_kv_copies: how often the fused weights hold each key/value head.
        shapes: of the parameters, by their dotted paths.
        files: bytes of each file of the parameters, by its path within the directory.
        version: of this format.
    """

    model_type: str
    dtype: str
    num_devices: int
    num_kv_copies: int
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, int] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read it back, and see that all files are there.

        Raises:
            CheckpointError: it is damaged, of another version, or a file has not its size.
        """
        path = directory / MANIFEST
        try:
            values = json.loads(path.read_text("utf-8"))
            if values["version"] != VERSION:
                raise CheckpointError(
                    f"{path} is of version {values['version']}, this program reads {VERSION}; "
                    "convert the model anew"
                )
            values["shapes"] = {name: tuple(shape) for name, shape in values["shapes"].items()}
            manifest = cls(**values)
            files = {directory / name: int(size) for name, size in manifest.files.items()}
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error
        for file, size in files.items():
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise CheckpointError(f"{file} {state}")
        return manifest


class OrbaxCheckpoint:
    """A directory that `arctic-jax convert` wrote.

    Raises:
        CheckpointError: a file is missing or truncated, the manifest damaged or of another version.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)

    def num_shards(self, num_devices: int) -> int:
        """Return P' for which the weights were fused; a model is built for it, not for P devices.

        What is fused for P' devices also serves each divisor of P', unless key/value heads were
        copied: on fewer devices the copies would fill the cache.

        Raises:
            CheckpointError: it does not serve P devices; the message says what to do.
        """
        made_for, copies = self.manifest.num_devices, self.manifest.num_kv_copies
        if num_devices == made_for or (made_for % num_devices == 0 and copies == 1):
            return made_for
        reason = f", with {copies} copies of each key/value head" if copies > 1 else ""
        raise CheckpointError(
            f"{self.directory} was made for {made_for} devices{reason}, not for {num_devices}; "
            f"run `arctic-jax convert MODEL OUT --devices {num_devices}` on the original model"
        )

    def restore(
        self,
        parameters: Mapping[str, ParameterSpec],
        mesh: Mesh,
    ) -> Iterator[tuple[str, jax.Array]]:
        """Place one parameter after the other on `mesh`; each device gets its own rows from disk.

        Raises:
            CheckpointError: a parameter is missing or has another shape than the config says, at
                once; or cannot be read, when it is its turn.
        """
        shapes = self.manifest.shapes
        missing = [path for path in parameters if path not in shapes]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} parameter(s): {', '.join(missing[:5])}"
            )
        for path, spec in parameters.items():
            if shapes[path] != spec.shape:
                raise CheckpointError(
                    f"{self.directory}: {path} has shape {shapes[path]}, the config asks for "
                    f"{spec.shape}"
                )

        def placed() -> Iterator[tuple[str, jax.Array]]:
            with _checkpointer() as checkpointer:
                for part, paths in parts(parameters):
                    specs = {path: parameters[path] for path in paths}
                    restored = self._restore(checkpointer, part, specs, mesh)
                    for path in paths:
                        yield path, restored.pop(path)

        return placed()

    def _restore(
        self, checkpointer: Any, part: str, specs: Mapping[str, ParameterSpec], mesh: Mesh
    ) -> dict[str, jax.Array]:
        import orbax.checkpoint as ocp

        wanted = {
            path: jax.ShapeDtypeStruct(
                spec.shape, spec.dtype, sharding=NamedSharding(mesh, spec.partition)
            )
            for path, spec in specs.items()
        }
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        folder = self.directory / _PARAMETERS / part
        try:
            return checkpointer.restore(folder.absolute(), args=arguments)
        except Exception as error:  # Orbax and TensorStore have no common class for damaged files
            reason = str(error).strip().split("\n")[0][:300]
            raise CheckpointError(
                f"{folder} cannot be read: {type(error).__name__}: {reason}"
            ) from error


def write(directory: Path, arrays: Iterable[Mapping[str, jax.Array]], manifest: Manifest) -> None:
    """Write parameters, a part (see `parts`) at a time; their manifest last.

    A device's rows of an array become one piece on disk. Without the manifest nothing is loaded.
    """
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        for part in arrays:
            folder = directory / _PARAMETERS / _part(next(iter(part)))
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(part)))
            del part  # before the next one is made
    files = [path for path in (directory / _PARAMETERS).rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in sorted(files)}
    text = json.dumps(asdict(replace(manifest, files=sizes)), indent=1)
    (directory / MANIFEST).write_text(text + "\n", "utf-8")


def parts(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Group the dotted paths of parameters, in their order, by what one Orbax checkpoint holds."""
    for part, group in itertools.groupby(paths, _part):
        yield part, list(group)


def _part(path: str) -> str:
    """`layers.3` of `layers.3.mlp.down`, `embed` of `embed.weight`."""
    names = path.split(".")
    return ".".join(names[:2] if names[1].isdigit() else names[:1])


def _checkpointer() -> Any:
    # Imported here: it takes a second that only those pay who need it. Weights do not compress.
    import orbax.checkpoint as ocp

    # Metadata of single arrays is of use for random keys alone. Orbax reads it beside the array,
    # and where the array turns out to be damaged, that coroutine is now and then dropped unawaited.
    arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=None)
    handler = ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )
    return ocp.Checkpointer(handler)
