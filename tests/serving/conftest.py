"""One tiny engine and one server of it for all tests that do not break them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_encoder
from live_server import LiveServer, serve

from arctic_jax.config import EngineConfig
from arctic_jax.engine.core import EngineCore
from arctic_jax.serving.async_engine import AsyncEngine
from arctic_jax.serving.embedding_engine import EmbeddingEngine
from arctic_jax.testing import write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, a byte a token, with a chat template."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_core(tiny_model: Path) -> EngineCore:
    """Its engine; whoever takes it puts it behind an `AsyncEngine`, one after the other."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 16, "num_blocks": 96}
    return EngineCore(EngineConfig.from_keywords(model=str(tiny_model), **options))


@pytest.fixture(scope="module")
def live(tiny_core: EngineCore) -> Iterator[LiveServer]:
    """A server of it."""
    engine = AsyncEngine(engine=tiny_core)
    with serve(engine, enable_prompt_tokens_details=True) as server:
        yield server
        server.wait_until_idle()
    engine.shutdown()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that embeds."""
    path: Path = tiny_encoder.write(tmp_path_factory.mktemp("encoder") / "model")
    engine = EmbeddingEngine(str(path), max_model_len=64, max_num_batched_tokens=128)
    with serve(engine) as server:
        yield server
        assert server.model.admission.num_calls == server.model.admission.num_answers == 0
    engine.shutdown()
