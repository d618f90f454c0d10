"""The cache's books: holders, prefixes, and what is forgotten first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from arctic_jax.engine.block_pool import BlockPool


def pool_of(num_blocks: int = 4, block_size: int = 2, caching: bool = True) -> BlockPool:
    return BlockPool(num_blocks, block_size, caching)


def fill(pool: BlockPool, token_ids: list[int], salt: str | None = None) -> list[int]:
    """Allocate and publish the full blocks of a sequence."""
    hashes = pool.hashes(token_ids, [], salt)
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for block, digest in zip(blocks, hashes, strict=True):
        pool.publish(block, digest)
    return blocks


def found(pool: BlockPool, token_ids: list[int], salt: str | None = None) -> list[int]:
    return pool.find(pool.hashes(token_ids, [], salt))


def test_all_or_none_are_allocated() -> None:
    pool = pool_of(4)
    first = pool.allocate(3)
    assert first is not None
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == []
    last = pool.allocate(1)
    assert last is not None
    assert sorted(first + last) == [0, 1, 2, 3]


def test_a_block_is_not_released_twice() -> None:
    pool = pool_of()
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[1]} has no holder"):
        pool.release(blocks)
    assert pool.num_free == 4
    pool.check([])


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = pool_of()
    blocks = fill(pool, [1, 2, 3, 4])
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check([blocks])
    pool.release(blocks)
    assert pool.num_free == 4


def test_prefixes_are_found_block_by_block() -> None:
    pool = pool_of(8)
    blocks = fill(pool, [1, 2, 3, 4, 5, 6])
    assert found(pool, [1, 2, 3, 4, 5, 6, 7]) == blocks
    assert found(pool, [1, 2, 3, 4, 5, 7]) == blocks[:2]
    assert found(pool, [1, 2, 3]) == blocks[:1]
    assert found(pool, [1]) == []
    assert found(pool, [3, 4, 5, 6]) == []  # a block is its whole past, not its own tokens
    assert found(pool, [9, 9, 3, 4]) == []


def test_a_prefix_ends_at_the_first_block_that_is_gone() -> None:
    pool = pool_of(8)
    blocks = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.forget(blocks[1])
    assert found(pool, [1, 2, 3, 4, 5, 6]) == blocks[:1]


def test_salts_keep_tenants_apart() -> None:
    pool = pool_of(8)
    blocks = {salt: fill(pool, [1, 2, 3, 4], salt) for salt in (None, "a", "b")}
    for salt, held in blocks.items():
        assert found(pool, [1, 2, 3, 4], salt) == held
    assert len({block for held in blocks.values() for block in held}) == 6
    assert found(pool, [1, 2], "c") == []


def test_hashes_cannot_be_foreseen() -> None:
    assert pool_of().hashes([1, 2], []) != pool_of().hashes([1, 2], [])


def test_hashes_are_extended_not_made_again() -> None:
    pool = pool_of()
    known = pool.hashes([1, 2, 3], [])
    assert len(known) == 1
    longer = pool.hashes([1, 2, 3, 4], known)
    assert longer is known
    assert longer == pool.hashes([1, 2, 3, 4], [])


def test_without_prefix_caching_nothing_is_hashed() -> None:
    pool = pool_of(caching=False)
    assert pool.hashes([1, 2, 3, 4], []) == []


def test_released_blocks_stay_findable_until_they_are_needed() -> None:
    pool = pool_of(4)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert found(pool, [1, 2, 3, 4]) == blocks
    assert set(pool.allocate(2) or ()) & set(blocks) == set()  # the two never used go first
    assert found(pool, [1, 2, 3, 4]) == blocks
    assert pool.allocate(1) == [blocks[1]]  # the end of a sequence before its beginning
    assert found(pool, [1, 2, 3, 4]) == blocks[:1]
    assert pool.allocate(1) == [blocks[0]]
    assert found(pool, [1, 2, 3, 4]) == []


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    pool = pool_of(3)
    for token in (1, 2, 3):
        pool.release(fill(pool, [token, token]))
    used = found(pool, [1, 1])
    pool.share(used)
    pool.release(used)
    pool.allocate(1)
    assert [bool(found(pool, [token, token])) for token in (1, 2, 3)] == [True, False, True]


def test_the_first_block_of_a_content_keeps_it() -> None:
    pool = pool_of(4)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    assert found(pool, [1, 2]) == first
    pool.release(second)
    others = pool.allocate(3)
    assert others is not None
    assert found(pool, [1, 2]) == first
    pool.check([first, others])


def test_resetting_forgets_contents_not_holders() -> None:
    pool = pool_of()
    blocks = fill(pool, [1, 2])
    pool.reset_prefix_cache()
    assert found(pool, [1, 2]) == []
    pool.check([blocks])
    pool.forget(blocks[0])  # of what is not known any more: nothing happens
    pool.publish(blocks[0], b"new")
    assert pool.find([b"new"]) == blocks


def test_the_books_show_leaks_and_strangers() -> None:
    pool = pool_of()
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.check([blocks])
    for wrong in ([], [blocks[:1]], [blocks, blocks], [[*blocks, 3]]):
        with pytest.raises(RuntimeError, match=r"blocks \[.*\] have other holders"):
            pool.check(wrong)


class AnyUse(RuleBasedStateMachine):
    """Sequences over two tokens come, share, and go, against a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(6)
        self.held: list[list[int]] = []
        self.contents: dict[int, tuple[int, ...]] = {}

    @rule(token_ids=st.lists(st.integers(0, 1), max_size=8))
    def start(self, token_ids: list[int]) -> None:
        hashes = self.pool.hashes(token_ids, [])
        shared = self.pool.find(hashes)
        for i, block in enumerate(shared):
            assert self.contents[block] == tuple(token_ids[: 2 * i + 2])
        self.pool.share(shared)
        own = self.pool.allocate(len(hashes) - len(shared))
        if own is None:
            self.pool.release(shared)
            return
        blocks = shared + own
        for i in range(len(shared), len(blocks)):
            self.contents[blocks[i]] = tuple(token_ids[: 2 * i + 2])
            self.pool.publish(blocks[i], hashes[i])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(which))

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check(self.held)
        assert self.pool.num_free == 6 - len({b for blocks in self.held for b in blocks})


AnyUse.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase
