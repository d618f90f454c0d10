"""Parameters of one shape in one array: in every layout each is what it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from arctic_jax.shift_parallel import ALONE, MeshLayout, make_mesh, shift, ulysses
from arctic_jax.weight_stacks import ALIGNMENT, WeightStacks

# Of each layer some matrices, a norm, and what XLA would copy slices of; and what there is one of.
LAYERS = 3
KINDS = {
    "qkv": ((8, 4, 64), "heads"),
    "down": ((16, 128), "ffn"),
    "bias": ((8, 5), "heads"),
    "norm": ((128,), None),
    "odd": ((70,), None),
    "upper": ((16, 128), "narrow"),
}
PARAMETERS = [((64, 32), "vocab"), *(kind for _ in range(LAYERS) for kind in KINDS.values())]


def stacked(
    tp: int, sp: int, layouts: list[MeshLayout], dtype: str = "float32", together: bool = True
) -> tuple[WeightStacks, list[jax.Array], tuple[jax.Array, ...]]:
    """How the parameters lie, they themselves, and their arrays in the last layout."""
    mesh = make_mesh(tp, sp)
    partitions = {at: [at.partition(axis) for _, axis in PARAMETERS] for at in layouts}
    shapes = [shape for shape, _ in PARAMETERS]
    dtypes = [jnp.dtype(dtype)] * len(shapes)
    stacks = WeightStacks.plan(shapes, partitions, dtypes, mesh, together)
    rng = np.random.default_rng(0)
    parameters = [
        jax.device_put(
            jnp.asarray(rng.standard_normal(shape), dtype),
            NamedSharding(mesh, layouts[-1].partition(axis)),
        )
        for shape, axis in PARAMETERS
    ]
    return stacks, parameters, stacks.fill(parameters, layouts[-1], mesh)


def sliced(
    stacks: WeightStacks, arrays: tuple[jax.Array, ...], layout: MeshLayout, tp: int, sp: int
) -> tuple[jax.Array, ...]:
    """What a program finds in the arrays."""
    return jax.jit(
        jax.shard_map(
            functools.partial(stacks.parameters, layout=layout),
            mesh=make_mesh(tp, sp),
            in_specs=(stacks.partitions(layout),),
            out_specs=tuple(layout.partition(axis) for _, axis in PARAMETERS),
        )
    )(arrays)


@pytest.mark.parametrize(("tp", "sp"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 8), (2, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_found_in_both_layouts(tp: int, sp: int, dtype: str) -> None:
    mesh, few, many = make_mesh(tp, sp), shift(tp, sp), ulysses(tp, sp)
    stacks, parameters, arrays = stacked(tp, sp, [few, many], dtype)
    finer, _ = stacks.finer(arrays, many, few, mesh)
    for layout, whole in ((many, arrays), (few, finer)):
        assert [array.sharding for array in whole] == [
            abstract.sharding for abstract in stacks.abstract(layout, mesh)
        ]
        assert [array.shape for array in whole] == [
            abstract.shape for abstract in stacks.abstract(layout, mesh)
        ]
        for found, wanted in zip(sliced(stacks, whole, layout, tp, sp), parameters, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_finer_arrays_are_views() -> None:
    tp, sp = 2, 2
    mesh, few, many = make_mesh(tp, sp), shift(tp, sp), ulysses(tp, sp)
    stacks, _, arrays = stacked(tp, sp, [few, many])
    finer, copied = stacks.finer(arrays, many, few, mesh)
    for stack, fine, coarse in zip(stacks.stacks, finer, arrays, strict=True):
        if stack.shape == KINDS["bias"][0]:
            continue
        for view, whole in zip(fine.addressable_shards, coarse.addressable_shards, strict=True):
            offset = view.data.unsafe_buffer_pointer() - whole.data.unsafe_buffer_pointer()
            assert 0 <= offset <= whole.data.nbytes - view.data.nbytes
    # Half a bias is 40 bytes: no program takes what begins there.
    assert copied == LAYERS * tp * 40


def test_what_is_not_split_further_is_the_same_array() -> None:
    mesh, few, many = make_mesh(2, 2), shift(2, 2), ulysses(2, 2)
    stacks, _, arrays = stacked(2, 2, [few, many])
    finer, _ = stacks.finer(arrays, many, few, mesh)
    same = [
        stack.shape
        for stack, fine, array in zip(stacks.stacks, finer, arrays, strict=True)
        if fine is array
    ]
    # The vocabulary, `upper` (`down` has its shape), norms, and those that stay apart.
    assert same == [
        (64, 32),
        *(KINDS[kind][0] for kind in ("norm", "odd", "upper")),
        *[KINDS["odd"][0]] * (LAYERS - 1),
    ]


def test_what_xla_would_copy_stays_apart() -> None:
    few, many = shift(2, 2), ulysses(2, 2)
    stacks, _, _ = stacked(2, 2, [few, many])
    counts = {stack.shape: len(stack.members) for stack in stacks.stacks}
    assert counts[KINDS["norm"][0]] == LAYERS
    assert counts[KINDS["bias"][0]] == counts[KINDS["odd"][0]] == 1
    for stack in stacks.stacks:
        row = int(np.prod(stack.shape[1:], dtype=int)) * 4
        for rows in (stack.stride, stack.rows[few], stack.rows[many]):
            assert len(stack.members) == 1 or rows * row % ALIGNMENT == 0


def test_alike_is_what_has_one_shape_and_lies_alike() -> None:
    """`down` and `upper` have the same shape; the latter is split over more devices."""
    stacks, _, _ = stacked(2, 2, [shift(2, 2), ulysses(2, 2)])
    shape = KINDS["down"][0]
    assert [len(stack.members) for stack in stacks.stacks if stack.shape == shape] == [3, 3]
    alone, _, arrays = stacked(2, 2, [shift(2, 2)])
    assert [len(stack.members) for stack in alone.stacks if stack.shape == shape] == [6]
    assert len(arrays) == 4 + 2 * LAYERS


def test_integers_are_not_among_weights_of_their_shape() -> None:
    """Ids of tokens that bfloat16 would round lie between norms, of the same length."""
    mesh, everywhere = make_mesh(1, 1), PartitionSpec()
    kinds = [jnp.dtype(kind) for _ in range(LAYERS) for kind in ("bfloat16", "int32")]
    lies = {ALONE: [everywhere] * len(kinds)}
    stacks = WeightStacks.plan([(128,)] * len(kinds), lies, kinds, mesh, together=True)
    assert [stack.dtype for stack in stacks.stacks] == kinds[:2]
    parameters = [jnp.arange(1000 + i, 1128 + i).astype(kind) for i, kind in enumerate(kinds)]
    arrays = stacks.fill(parameters, ALONE, mesh)
    assert [array.dtype for array in arrays] == [a.dtype for a in stacks.abstract(ALONE, mesh)]
    for found, wanted in zip(stacks.parameters(arrays, ALONE), parameters, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_apart_every_parameter_is_itself() -> None:
    stacks, parameters, arrays = stacked(1, 2, [ulysses(1, 2)], together=False)
    assert all(array is parameter for array, parameter in zip(arrays, parameters, strict=True))
    found = sliced(stacks, arrays, ulysses(1, 2), 1, 2)
    for parameter, wanted in zip(found, parameters, strict=True):
        np.testing.assert_array_equal(parameter, wanted)


def test_a_second_module_comes_behind_the_first() -> None:
    stacks, parameters, arrays = stacked(1, 1, [ALONE])
    both = stacks.followed_by(stacks)
    found = jax.jit(functools.partial(both.parameters, layout=ALONE))((*arrays, *arrays))
    for parameter, wanted in zip(found, parameters * 2, strict=True):
        np.testing.assert_array_equal(parameter, wanted)


def test_rows_that_a_device_does_not_have_are_refused() -> None:
    mesh, many = make_mesh(2, 2), ulysses(2, 2)
    other = MeshLayout("other", (), ("sp", "tp"), ("sp", "tp"))
    lies = {other: [PartitionSpec(("sp", "tp"))], many: [PartitionSpec("tp")]}
    stacks = WeightStacks.plan([(16, 256)], lies, [jnp.dtype("float32")], mesh)
    array = jax.device_put(jnp.zeros((16, 256)), NamedSharding(mesh, PartitionSpec("tp")))
    with pytest.raises(ValueError, match=r"has rows 0:8 of \(16, 256\), .* gives it 8:12"):
        stacks.finer([array], many, other, mesh)
