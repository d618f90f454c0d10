"""The cache's blocks: who holds them, and which prefixes they hold. Host only, no jax.

Owned by the scheduler. A block whose last holder lets go keeps its content and stays findable by
its hash until it is needed for something else, least recently used first.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockPool:
    """Allocation, sharing and prefix lookup of `num_blocks` blocks."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        # Unpredictable hashes: a prompt cannot be made to collide with another tenant's.
        self._seed = secrets.token_bytes(32)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks for one holder, or none at all if there are not enough."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.forget(block)
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to each block."""
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take away a holder from each block of one sequence.

        The last block goes first into the queue of free blocks: the end of a sequence is less
        likely to be asked for again than its beginning.

        Raises:
            ValueError: a block has no holder.
        """
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} has no holder")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def hashes(
        self, token_ids: Sequence[int], known: list[bytes], salt: str | None = None
    ) -> list[bytes]:
        """Extend `known` by the hashes of the further full blocks of a sequence, and return it.

        A block's hash covers all tokens up to its end, and `salt`, which keeps tenants apart.
        """
        if not self.enable_prefix_caching:
            return known
        size = self.block_size
        for i in range(len(known), len(token_ids) // size):
            parent = (
                known[i - 1] if i else self._seed + (salt or "").encode("utf-8", "surrogatepass")
            )
            tokens = np.asarray(token_ids[i * size : (i + 1) * size], np.int32).tobytes()
            known.append(hashlib.sha256(parent + tokens).digest())
        return known

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest prefix of `hashes` that is in the cache."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block findable; the first block of a content keeps it."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def forget(self, block: int) -> None:
        """Make a block unfindable."""
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def reset_prefix_cache(self) -> None:
        """Forget all contents."""
        self._block_of.clear()
        self._hash_of.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Check the books against the blocks that the sequences say they hold.

        Raises:
            RuntimeError: a block is leaked, or held by somebody who is not on the list.
        """
        counts = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                counts[block] += 1
        if counts != self._holders:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._holders[b]]
            raise RuntimeError(f"blocks {wrong[:10]} have other holders than the books say")
        if {b for b in range(self.num_blocks) if counts[b] == 0} != set(self._free):
            raise RuntimeError("the free blocks are not those without a holder")
