"""Embeddings from an event loop: shared batches, order, errors, cancellation, back-pressure."""

import asyncio
import random
import threading

import numpy as np
import pytest
import tiny_encoder

from arctic_jax.config import EngineConfig
from arctic_jax.embedding.embedder import Embedder, EmbeddingParams
from arctic_jax.errors import EngineDeadError, InvalidRequestError
from arctic_jax.serving.embedding_engine import EmbeddingEngine


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    path = tiny_encoder.write(tmp_path_factory.mktemp("encoder") / "model")
    return Embedder(
        EngineConfig.from_keywords(model=str(path), max_model_len=128, max_num_batched_tokens=256)
    )


class Gate:
    """Stands between engine and device: counts batches, and holds them up while it is closed."""

    def __init__(self, embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[int] = []
        self.open = threading.Event()
        launch = embedder.launch

        def held(plan, waiting):
            self.plans.append(len(plan.lengths))
            assert self.open.wait(30)
            return launch(plan, waiting)

        monkeypatch.setattr(embedder, "launch", held)


def run(embedder: Embedder, scenario, **options) -> None:
    """Run a scenario with an engine, which must be empty at the end."""

    async def main() -> None:
        engine = EmbeddingEngine(embedder=embedder, **options)
        try:
            await asyncio.wait_for(scenario(engine), 60)
            assert engine.num_waiting == 0
        finally:
            await asyncio.to_thread(engine.shutdown)

    asyncio.run(main())


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_many_small_requests_share_batches(embedder, monkeypatch) -> None:
    texts = [f"text {i}" for i in range(200)]
    expected = embedder.embed(texts)
    gate = Gate(embedder, monkeypatch)
    gate.open.set()

    async def scenario(engine: EmbeddingEngine) -> None:
        rows = await asyncio.gather(*(engine.embed(text) for text in texts))
        np.testing.assert_allclose(np.concatenate(rows), expected, atol=2e-6)

    run(embedder, scenario)
    assert sum(gate.plans) == 200
    assert len(gate.plans) < 40


def test_requests_of_one_turn_of_the_event_loop_are_one_batch(embedder, monkeypatch) -> None:
    gate = Gate(embedder, monkeypatch)
    gate.open.set()

    async def scenario(engine: EmbeddingEngine) -> None:
        await asyncio.gather(*(engine.embed(f"text {i}") for i in range(5)))

    run(embedder, scenario)
    assert gate.plans == [5]


def test_a_large_request_keeps_its_order(embedder) -> None:
    texts = ["x" * (i % 120) + str(i) for i in range(700)]

    async def scenario(engine: EmbeddingEngine) -> None:
        params = EmbeddingParams(dimensions=4, prompt_name="query")
        rows = await engine.embed(texts, params)
        np.testing.assert_allclose(rows, embedder.embed(texts, params), atol=2e-6)
        assert (await engine.embed([])).shape == (0, 32)

    run(embedder, scenario)


def test_a_bad_request_fails_alone(embedder) -> None:
    async def scenario(engine: EmbeddingEngine) -> None:
        strict = EmbeddingParams(truncate=False)
        answers = await asyncio.gather(
            engine.embed(["good", "better"]),
            engine.embed(["fine", None]),
            engine.embed("long" * 100, strict),
            engine.embed("x", EmbeddingParams(dimensions=0)),
            engine.embed("short", strict),
            return_exceptions=True,
        )
        kinds = [isinstance(answer, InvalidRequestError) for answer in answers]
        assert kinds == [False, True, True, True, False]
        np.testing.assert_allclose(
            np.asarray(answers[0]), embedder.embed(["good", "better"]), atol=2e-6
        )

    run(embedder, scenario)


def test_a_cancelled_request_costs_no_batch(embedder, monkeypatch) -> None:
    gate = Gate(embedder, monkeypatch)

    async def scenario(engine: EmbeddingEngine) -> None:
        first = asyncio.create_task(engine.embed("first"))
        await until(lambda: gate.plans)  # and the device thread stands at the gate
        others = [asyncio.create_task(engine.embed(f"other {i}")) for i in range(20)]
        await until(lambda: engine.num_waiting == 21)
        for task in others[:19]:
            task.cancel()
        await asyncio.gather(*others[:19], return_exceptions=True)
        gate.open.set()
        await asyncio.gather(first, others[19])

    run(embedder, scenario)
    assert sum(gate.plans) == 2


def test_what_finds_the_engine_full_waits_outside(embedder, monkeypatch) -> None:
    gate = Gate(embedder, monkeypatch)

    async def scenario(engine: EmbeddingEngine) -> None:
        tasks = [asyncio.create_task(engine.embed(f"text {i}")) for i in range(50)]
        await until(lambda: gate.plans)
        assert engine.num_waiting == 3
        gate.open.set()
        rows = np.concatenate(await asyncio.gather(*tasks))
        np.testing.assert_allclose(
            rows, embedder.embed([f"text {i}" for i in range(50)]), atol=2e-6
        )

    run(embedder, scenario, max_waiting=3)


def test_random_load_ends_with_empty_queues(embedder) -> None:
    draw = random.Random(0)

    async def client(engine: EmbeddingEngine) -> int:
        texts = ["y" * draw.randrange(1, 150) for _ in range(draw.randrange(6))]
        task = asyncio.create_task(engine.embed(texts))
        await asyncio.sleep(draw.random() * 0.05)
        if draw.random() < 0.3:
            task.cancel()
        try:
            return len(await task) - len(texts)
        except asyncio.CancelledError:
            return 0

    async def scenario(engine: EmbeddingEngine) -> None:
        for _ in range(10):
            assert not any(await asyncio.gather(*(client(engine) for _ in range(30))))

    run(embedder, scenario, max_waiting=16)


def test_a_failure_reaches_everybody(embedder, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(embedder, "launch", fail)

    async def scenario(engine: EmbeddingEngine) -> None:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await engine.embed("x")

    run(embedder, scenario)


def test_a_stopped_engine_says_so(embedder) -> None:
    async def scenario(engine: EmbeddingEngine) -> None:
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDeadError, match="shut down"):
            await engine.embed("x")

    run(embedder, scenario)
