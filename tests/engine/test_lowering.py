"""Programs lowered in other processes are those that this process would have made."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from tiny_engine import CONFIG, GREEDY, make_engine, make_tensors, run, write_files

from arctic_jax.engine import runner
from arctic_jax.engine.core import EngineCore
from arctic_jax.engine.drafting import ModelDrafting
from arctic_jax.engine.lowering import LoweringPool
from arctic_jax.engine.programs import ProgramCache
from arctic_jax.engine.step_program import Step, StepProgram
from arctic_jax.models.layers import dtype_of, named_parameters
from arctic_jax.pallas_kernels import dispatch
from arctic_jax.weight_stacks import WeightStacks

LAYERS = 3
PROMPTS = [[1, 2, 3], list(range(4, 40))]


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        runner,
        "ProgramCache",
        lambda program, mesh, directory, processes: ProgramCache(program, mesh, None, 2),
    )


@pytest.mark.parametrize("options", [{}, {"ulysses_sequence_parallel_size": 2}])
def test_engines_of_such_programs_answer_the_same(
    options: dict[str, int], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(make_engine(**options))
    request.getfixturevalue("two_processes")
    engine = make_engine(**options)
    assert engine.runner.programs._pool is None  # closed
    assert answers(engine) == expected
    assert "lowered in this process" not in caplog.text


@pytest.mark.usefixtures("two_processes")
def test_a_process_that_dies_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with caplog.at_level(logging.WARNING):
        engine = make_engine()
    assert "it is lowered in this process" in caplog.text
    assert answers(engine)


def test_errors_are_sent() -> None:
    program, mesh, step = parts()
    pool = LoweringPool(program, mesh, 1)
    try:
        with pytest.raises(RuntimeError, match="KeyError"):
            pool.lower(step._replace(layout="no layout"))
        pool.lower(step)  # the process goes on
    finally:
        pool.close()


@pytest.mark.parametrize("with_draft_model", [False, True])
def test_kernels_are_lowered_where_there_is_no_gpu(with_draft_model: bool, tmp_path: Path) -> None:
    options = {}
    if with_draft_model:
        write_files(tmp_path, CONFIG, make_tensors())
        options["speculative_config"] = {"method": "draft_model", "model": str(tmp_path)}
    program, mesh, step = parts(**options)
    exported = for_hopper(stacked(kernels_fit(program), mesh), mesh, step)
    assert exported.platforms == ("cuda",)
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.parametrize("has_inboxes", [False, True])
def test_inboxes_replace_every_sum_of_few_tokens(has_inboxes: bool) -> None:
    program, mesh, step = parts(ulysses_sequence_parallel_size=2, shift_parallel_threshold=64)
    assert step.layout.name == "shift"
    program = kernels_fit(program)
    model_config = replace(program.model_config, hidden_size=1024)
    program = replace(program, model_config=model_config, has_inboxes=has_inboxes)
    text = for_hopper(stacked(program, mesh), mesh, step).mlir_module()
    assert ("stablehlo.all_reduce" in text) is not has_inboxes
    assert "stablehlo.all_gather" in text  # of the logits


def kernels_fit(program: StepProgram) -> StepProgram:
    """The program with sizes that the kernels take."""
    model_config = replace(program.model_config, head_dim=64, num_hidden_layers=LAYERS)
    drafting = program.drafting
    if isinstance(drafting, ModelDrafting):
        drafting = replace(drafting, config=model_config, block_size=16)
    models = tuple(replace(model, num_layers=LAYERS, head_dim=64) for model in program.cache.models)
    cache = replace(program.cache, models=models, block_size=16, dtype=jnp.dtype("bfloat16"))
    return replace(program, model_config=model_config, drafting=drafting, cache=cache)


def stacked(program: StepProgram, mesh: Mesh) -> StepProgram:
    """The program with the arrays that a GPU's would have for the parameters of its modules."""
    variables = named_parameters(program._modules()).values()
    axes = [variable.get_metadata("axis") for variable in variables]
    layouts = program.weights.stacks[0].partitions
    partitions = {layout: tuple(map(layout.partition, axes)) for layout in layouts}
    shapes = [variable.shape for variable in variables]
    dtypes = [dtype_of(variable, program.cache.dtype) for variable in variables]
    weights = WeightStacks.plan(shapes, partitions, dtypes, mesh, together=True)
    assert len(weights.stacks) < len(shapes)
    return replace(program, weights=weights)


def for_hopper(program: StepProgram, mesh: Mesh, step: Step) -> jax.export.Exported:
    with dispatch.lowering_for_hopper():
        return jax.export.deserialize(bytearray(program.export(step, mesh, "cuda")))


def answers(engine: EngineCore) -> list[list[int]]:
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, GREEDY)
    done = run(engine)
    return [done[str(i)].outputs[0].token_ids for i in range(len(PROMPTS))]


def parts(**options: Any) -> tuple[StepProgram, Mesh, Step]:
    """A program, its mesh, and a step of it."""
    made = make_engine(**options).runner
    layout, bucket = made.picker.steps[0]
    return made.programs._program, made.mesh, Step(layout, bucket, made.num_blocks)
