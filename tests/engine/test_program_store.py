"""Programs kept on disk: found again, not found when anything differs, harmless when damaged."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, GREEDY, make_engine, run

from arctic_jax.engine import program_store
from arctic_jax.engine.program_store import ProgramStore

ARGUMENTS = (jax.ShapeDtypeStruct((3,), jnp.float32),)


def compiled() -> jax.stages.Compiled:
    return jax.jit(lambda x: 2 * x).lower(*ARGUMENTS).compile()


def store(directory: Path | None, *owner: object) -> ProgramStore:
    return ProgramStore(directory, jax.devices()[:1], *owner)


def load(found: ProgramStore, name: str = "double") -> jax.stages.Compiled | None:
    return found.load(name, ARGUMENTS, ARGUMENTS[0])


def test_what_is_saved_is_found_again(tmp_path: Path) -> None:
    store(tmp_path, "me").save("double", compiled())
    program = load(store(tmp_path, "me"))
    assert program is not None
    np.testing.assert_array_equal(program(jnp.arange(3.0)), [0, 2, 4])


def test_another_name_owner_or_environment_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, "me").save("double", compiled())
    assert load(store(tmp_path, "me"), "triple") is None
    assert load(store(tmp_path, "you")) is None
    assert load(store(None, "me")) is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert load(store(tmp_path, "me")) is None


def test_a_changed_source_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package" / "engine"
    package.mkdir(parents=True)
    source = package / "program_store.py"
    source.write_text("a = 1")
    monkeypatch.setattr(program_store, "__file__", str(source))
    store(tmp_path).save("double", compiled())
    assert load(store(tmp_path)) is not None
    above = package.parent / "serving"
    above.mkdir()
    (above / "server.py").write_text("a = 1")  # the engine does not import it
    assert load(store(tmp_path)) is not None
    source.write_text("a = 2")
    assert load(store(tmp_path)) is None


def test_damaged_files_and_full_disks_are_no_errors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path).save("double", compiled())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert load(store(tmp_path)) is None
    assert "made anew" in caplog.text
    blocked = tmp_path / "file"
    blocked.write_text("")
    store(blocked / "directory").save("double", compiled())
    assert "could not be kept" in caplog.text


def test_what_was_not_used_for_long_is_removed(tmp_path: Path) -> None:
    store(tmp_path).save("double", compiled())
    (path,) = tmp_path.iterdir()
    store(tmp_path)
    assert path.exists()
    old = path.stat().st_mtime - (program_store.UNUSED_DAYS + 1) * 24 * 3600
    os.utime(path, (old, old))
    store(tmp_path)
    assert not path.exists()


def test_a_second_engine_traces_nothing_and_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 8}
    answers = []
    for start in range(2):
        if start:
            refuse = lambda *_: pytest.fail("a step was traced")
            monkeypatch.setattr("arctic_jax.models.llama.LlamaForCausalLM.__call__", refuse)
        engine = make_engine(CONFIG, **options)
        engine.add_request("a", [1, 2, 3], GREEDY)
        answers.append(run(engine)["a"].outputs[0].token_ids)
    assert answers[0] == answers[1]
