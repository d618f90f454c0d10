"""Both layouts in one engine: the same tokens, the same weights, the same cache."""

import itertools

import jax
import numpy as np
import plain_model
import pytest
from tiny_engine import CONFIG, GREEDY, make_engine, make_tensors, run

from arctic_jax.batch import Bucket, ScheduledBatch
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.layout_picker import LayoutPicker
from arctic_jax.shift_parallel import MeshLayout

TENSORS = make_tensors()
MESHES = [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)]
PROMPTS = [
    [int(t) for t in np.random.default_rng(i).integers(0, 97, n)]
    for i, n in enumerate((1, 5, 40, 33))
]


class Alternating(LayoutPicker):
    """Takes the other layout every step."""

    def __init__(self, ladders: dict[MeshLayout, tuple[Bucket, ...]]) -> None:
        super().__init__(dict.fromkeys(ladders, ()), 0)
        self._ladders = ladders
        self._turn = itertools.cycle(ladders)

    def pick(self, scheduled: ScheduledBatch) -> tuple[MeshLayout, Bucket]:
        layout = next(self._turn)
        return layout, Bucket.fit(scheduled, self._ladders[layout])


def shifting_engine(tp: int, sp: int, config: dict = CONFIG, **options) -> EngineCore:
    if jax.device_count() < tp * sp:
        pytest.skip(f"{jax.device_count()} devices")
    tensors = TENSORS if config is CONFIG else make_tensors(config)
    return make_engine(
        config, tensors, tensor_parallel_size=tp, ulysses_sequence_parallel_size=sp, **options
    )


def answers(engine: EngineCore, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    done = run(engine)
    engine.check()
    return [done[str(i)].outputs[0].token_ids for i in range(len(prompts))]


def expected(config: dict = CONFIG, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    tensors = TENSORS if config is CONFIG else make_tensors(config)
    return [plain_model.greedy(config, tensors, prompt, GREEDY.max_tokens) for prompt in prompts]


@pytest.mark.parametrize("threshold", [0, 4, 10**6])
def test_any_threshold_gives_the_same_tokens(threshold: int) -> None:
    engine = shifting_engine(2, 2, shift_parallel_threshold=threshold)
    assert answers(engine) == expected()
    layouts = {layout.name for layout, _ in engine.runner.picker.steps}
    assert layouts == {0: {"ulysses"}, 4: {"ulysses", "shift"}, 10**6: {"shift"}}[threshold]


@pytest.mark.parametrize(("tp", "sp"), MESHES)
def test_another_layout_every_step(tp: int, sp: int) -> None:
    engine = shifting_engine(tp, sp, shift_parallel_threshold=0, num_blocks=26)
    runner = engine.runner
    runner.picker = Alternating(runner._ladders)
    steps = [(layout, bucket) for layout, ladder in runner._ladders.items() for bucket in ladder]
    runner.programs.compile(steps, runner.num_blocks)
    assert answers(engine) == expected()
