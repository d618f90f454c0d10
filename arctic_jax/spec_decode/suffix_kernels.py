"""Suffix trees in flat arrays: what is compiled. Host only, numba, no jax.

Any number of trees share the pools of one `Forest`, so that one call serves a whole batch. A tree
is a path-compressed trie of the suffixes of its sequences, each cut off after `max_depth` tokens
(Oliaro et al. 2024, "SuffixDecoding", arXiv 2411.04975). Everything is an index into a pool; 0 is
nothing.

All in one file: numba's cache on disk notices a change of the file of the function that is called,
not of those it calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

compiled = numba.njit(cache=True)
inlined = numba.njit(cache=True, forceinline=True)


def _int32_fields(names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int32) for name in names.split()])


# count: suffixes that pass or end here. label: where a copy of the edge's tokens begins, within a
# suffix that passes here. suffix: the first of those that end here, at the end of the edge.
# Siblings are in the order of falling counts.
NODE = _int32_fields("count token length label parent first last prev next group suffix")
GROUP = _int32_fields("head tail")  # siblings of equal count, so that each moves in O(1)
SUFFIX = _int32_fields("node prev next")  # the others that end in the same node
PAGE = _int32_fields("sequence prev next")
SEQUENCE = _int32_fields("root length first_page last_page")
# For each pool: how many are in use, how many rows ever were, the first one free to use again.
POOLS = np.dtype(
    [(f"{field}_{pool}", np.int64) for pool in ("node", "group", "page", "sequence")
     for field in ("used", "end", "free")]
)  # fmt: skip
DRAFT = np.dtype([("num_tokens", np.int64), ("match_len", np.int64), ("score", np.float32)])
CANDIDATE = np.dtype(
    [("prob", np.float32), ("parent", np.int32), ("node", np.int32), ("used", np.int32)]
)


class Outputs(NamedTuple):
    """Where at least B drafts are written to. Each has room for L tokens.

    Attributes:
        token_ids: `[B, L]` int32.
        parents: `[B, L]` int32.
        probs: `[B, L]` float32.
        drafts: `[B]` of `DRAFT`.
    """

    token_ids: np.ndarray[Any, Any]
    parents: np.ndarray[Any, Any]
    probs: np.ndarray[Any, Any]
    drafts: np.ndarray[Any, Any]


class Forest(NamedTuple):
    """The pools. A page holds the suffixes that start in it, and enough tokens that each is whole.

    Attributes:
        nodes: `[N]` of `NODE`.
        groups: `[N]` of `GROUP`.
        table: `[2 N]` hash table of (parent, first token) → node; N is a power of 2.
        tokens: `[P * 2 * page_size]` int32; the second half of a page repeats the next page.
        suffixes: `[P * page_size]` of `SUFFIX`, by where they start.
        pages: `[P]` of `PAGE`.
        sequences: `[S]` of `SEQUENCE`.
        pools: `[1]` of `POOLS`.
        max_depth: tokens of the longest suffix.
        page_bits: log2 of the page size, which is at least `max_depth`.
    """

    nodes: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]
    table: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    suffixes: np.ndarray[Any, Any]
    pages: np.ndarray[Any, Any]
    sequences: np.ndarray[Any, Any]
    pools: np.ndarray[Any, Any]
    max_depth: int
    page_bits: int

    def addresses(self) -> np.ndarray[Any, Any]:
        """Return what compiled functions take in its place, valid as long as these arrays are."""
        arrays = self[:8]
        return np.array(
            [*(a.ctypes.data for a in arrays), *(a.size for a in arrays), *self[8:]], np.int64
        )


# --- compiled functions get addresses: arrays would be counted as references are, at each call and
# by atomic instructions, which takes longer than the work itself


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), codegen


@inlined
def _array(address, size, dtype):
    pointer = _pointer(address)  # pyright: ignore[reportCallIssue]
    return numba.carray(pointer, size, dtype)  # pyright: ignore[reportPrivateImportUsage]


@inlined
def _forest(a):
    return Forest(
        _array(a[0], a[8], NODE),
        _array(a[1], a[9], GROUP),
        _array(a[2], a[10], np.int32),
        _array(a[3], a[11], np.int32),
        _array(a[4], a[12], SUFFIX),
        _array(a[5], a[13], PAGE),
        _array(a[6], a[14], SEQUENCE),
        _array(a[7], a[15], POOLS),
        a[16],
        a[17],
    )


# --- pools: rows that were freed are linked and used again, the latest first


@inlined
def _new_node(f, parent, token, length, label, count):
    pools = f.pools[0]
    node = pools.free_node
    if node:
        pools.free_node = f.nodes[node].next
    else:
        node = pools.end_node
        pools.end_node += 1
    pools.used_node += 1
    row = f.nodes[node]
    row.count, row.token, row.length, row.label, row.parent = count, token, length, label, parent
    row.first = row.last = row.prev = row.next = row.group = row.suffix = 0
    return node


@inlined
def _free_node(f, node):
    f.nodes[node].next = f.pools[0].free_node
    f.nodes[node].parent = 0
    f.pools[0].free_node = node
    f.pools[0].used_node -= 1


@inlined
def _new_group(f, node):
    """Let a node be a group of its own."""
    pools = f.pools[0]
    group = pools.free_group
    if group:
        pools.free_group = f.groups[group].head
    else:
        group = pools.end_group
        pools.end_group += 1
    pools.used_group += 1
    f.groups[group].head = f.groups[group].tail = node
    f.nodes[node].group = group


@inlined
def _free_group(f, group):
    f.groups[group].head = f.pools[0].free_group
    f.pools[0].free_group = group
    f.pools[0].used_group -= 1


@inlined
def _new_page(f, sequence):
    """Append a page to a sequence."""
    pools = f.pools[0]
    page = pools.free_page
    if page:
        pools.free_page = f.pages[page].next
    else:
        page = pools.end_page
        pools.end_page += 1
    pools.used_page += 1
    owner = f.sequences[sequence]
    f.pages[page].sequence, f.pages[page].prev, f.pages[page].next = sequence, owner.last_page, 0
    if owner.last_page:
        f.pages[owner.last_page].next = page
    else:
        owner.first_page = page
    owner.last_page = page
    return page


@inlined
def _free_sequence(f, sequence):
    """Free a sequence and its pages."""
    pools = f.pools[0]
    page = f.sequences[sequence].first_page
    while page:
        following = f.pages[page].next
        f.pages[page].next = pools.free_page
        f.pages[page].sequence = 0
        pools.free_page = page
        pools.used_page -= 1
        page = following
    f.sequences[sequence].root = pools.free_sequence
    pools.free_sequence = sequence
    pools.used_sequence -= 1


@compiled
def new_root(addresses):
    """Plant a tree; return its root."""
    f = _forest(addresses)
    return _new_node(f, 0, 0, 0, 0, 0)


@compiled
def new_sequence(addresses, root):
    """Begin a sequence, without tokens, in the tree of `root`; return it."""
    f = _forest(addresses)
    pools = f.pools[0]
    sequence = pools.free_sequence
    if sequence:
        pools.free_sequence = f.sequences[sequence].root
    else:
        sequence = pools.end_sequence
        pools.end_sequence += 1
    pools.used_sequence += 1
    row = f.sequences[sequence]
    row.root, row.length, row.first_page, row.last_page = root, 0, 0, 0
    return sequence


# --- children by their first token: open addressing, linear probing. An only child, which most
# nodes are, is found without and is not in the table


@inlined
def _home(f, parent, token):
    """Where the probing for a child begins (Knuth's multiplicative hash)."""
    key = (np.uint64(parent) << np.uint64(32)) | np.uint64(np.uint32(token))
    mixed = (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return np.int64(mixed) & (f.table.size - 1)


@inlined
def _has_siblings(f, node):
    return f.nodes[node].prev != 0 or f.nodes[node].next != 0


@inlined
def _find_child(f, node, token):
    first = f.nodes[node].first
    if first == 0 or f.nodes[first].token == token:
        return np.int64(first)
    if f.nodes[first].next == 0:
        return np.int64(0)
    slot = _home(f, node, token)
    while f.table[slot]:
        child = f.nodes[f.table[slot]]
        if child.parent == node and child.token == token:
            return np.int64(f.table[slot])
        slot = (slot + 1) & (f.table.size - 1)
    return np.int64(0)


@inlined
def _enter(f, node):
    """Put a node into the table."""
    slot = _home(f, f.nodes[node].parent, f.nodes[node].token)
    while f.table[slot]:
        slot = (slot + 1) & (f.table.size - 1)
    f.table[slot] = node


@inlined
def _slot(f, node):
    slot = _home(f, f.nodes[node].parent, f.nodes[node].token)
    while f.table[slot] != node:
        slot = (slot + 1) & (f.table.size - 1)
    return slot


@inlined
def _leave(f, node):
    """Take a node out of the table, and close the gap (Knuth, vol. 3, algorithm 6.4R)."""
    mask = f.table.size - 1
    gap = _slot(f, node)
    slot = (gap + 1) & mask
    while f.table[slot]:
        other = f.nodes[f.table[slot]]
        # It may move to the gap unless its home lies between the gap and its place.
        if ((slot - _home(f, other.parent, other.token)) & mask) >= ((slot - gap) & mask):
            f.table[gap] = f.table[slot]
            gap = slot
        slot = (slot + 1) & mask
    f.table[gap] = 0


@compiled
def fill_table(addresses):
    """Enter all nodes of all trees into an empty table."""
    f = _forest(addresses)
    for node in range(1, f.pools[0].end_node):
        if f.nodes[node].parent and _has_siblings(f, node):  # neither free nor a root
            _enter(f, node)


# --- siblings: a doubly linked list, highest count first, equal counts in the order that the
# rules below give them; path drafts follow the first, so the order is part of the result


@inlined
def _link(f, node, before):
    """Put a node into its parent's list, before a sibling or, if that is 0, at the end."""
    row, parent = f.nodes[node], f.nodes[f.nodes[node].parent]
    row.next = before
    row.prev = f.nodes[before].prev if before else parent.last
    if row.prev:
        f.nodes[row.prev].next = node
    else:
        parent.first = node
    if before:
        f.nodes[before].prev = node
    else:
        parent.last = node


@inlined
def _unlink(f, node):
    """Take a node out of its parent's list and out of its group."""
    row, parent = f.nodes[node], f.nodes[f.nodes[node].parent]
    if row.prev:
        f.nodes[row.prev].next = row.next
    else:
        parent.first = row.next
    if row.next:
        f.nodes[row.next].prev = row.prev
    else:
        parent.last = row.prev
    group = f.groups[row.group]
    if group.head == group.tail:
        _free_group(f, row.group)
    elif group.head == node:
        group.head = row.next
    elif group.tail == node:
        group.tail = row.prev


@inlined
def _add_child(f, node):
    """Put a new node of count 1 behind all its siblings."""
    last = np.int64(f.nodes[f.nodes[node].parent].last)
    if last and f.nodes[last].prev == 0:
        _enter(f, last)  # no only child any more
    _link(f, node, 0)
    if last and f.nodes[last].count == f.nodes[node].count:
        f.nodes[node].group = f.nodes[last].group
        f.groups[f.nodes[node].group].tail = node
    else:
        _new_group(f, node)
    if last:
        _enter(f, node)


@inlined
def _remove_child(f, node):
    parent = f.nodes[f.nodes[node].parent]
    if parent.first != parent.last:
        _leave(f, node)
    _unlink(f, node)
    if parent.first and parent.first == parent.last:
        _leave(f, np.int64(parent.first))
    _free_node(f, node)


@inlined
def _replace(f, old, new):
    """Let `new`, which is in no list, take the place of `old`, count and first token included."""
    row, gone = f.nodes[new], f.nodes[old]
    if _has_siblings(f, old):
        f.table[_slot(f, old)] = new
    row.count, row.token, row.parent = gone.count, gone.token, gone.parent
    row.prev, row.next, row.group = gone.prev, gone.next, gone.group
    if row.prev:
        f.nodes[row.prev].next = new
    else:
        f.nodes[row.parent].first = new
    if row.next:
        f.nodes[row.next].prev = new
    else:
        f.nodes[row.parent].last = new
    group = f.groups[row.group]
    if group.head == old:
        group.head = new
    if group.tail == old:
        group.tail = new


@inlined
def _increment(f, node):
    """Count one suffix more.

    Out of the middle of its group a node goes to the tail of the next higher one; the head of a
    group becomes the head of the next higher one, if that is higher by one.
    """
    row = f.nodes[node]
    count = row.count + 1
    group = f.groups[row.group]
    prev = row.prev
    if group.head == node:
        if prev == 0 or f.nodes[prev].count > count:
            if group.tail != node:
                group.head = row.next
                _new_group(f, node)
        else:
            _unlink(f, node)
            row.group = f.nodes[prev].group
            _link(f, node, f.groups[row.group].head)
            f.groups[row.group].head = node
    else:
        head = group.head
        prev = f.nodes[head].prev
        _unlink(f, node)
        _link(f, node, head)
        if prev and f.nodes[prev].count == count:
            row.group = f.nodes[prev].group
            f.groups[row.group].tail = node
        else:
            _new_group(f, node)
    row.count = count


@inlined
def _decrement(f, node):
    """Count one suffix less: behind its group, and at the head of the next lower one."""
    row = f.nodes[node]
    count = row.count - 1
    group = f.groups[row.group]
    after = f.nodes[group.tail].next
    joins = after != 0 and f.nodes[after].count == count
    if group.head != node or group.tail != node or joins:
        _unlink(f, node)
        _link(f, node, after)
        if joins:
            row.group = f.nodes[after].group
            f.groups[row.group].head = node
        else:
            _new_group(f, node)
    row.count = count


# --- sequences and their suffixes


@inlined
def _owner(f, label):
    """The sequence whose tokens a label points at."""
    return f.pages[label >> (f.page_bits + 1)].sequence


@inlined
def _suffix(f, sequence, start):
    """The suffix that starts at a token of the last or the last but one page."""
    row = f.sequences[sequence]
    page = row.last_page
    if start >> f.page_bits < (row.length - 1) >> f.page_bits:
        page = f.pages[page].prev
    return (page << f.page_bits) + (start & ((1 << f.page_bits) - 1))


@inlined
def _text(f, suffix):
    """Where a suffix's tokens are."""
    return suffix + (suffix >> f.page_bits << f.page_bits)


@inlined
def _end_in(f, suffix, node):
    """Let a suffix end in a node."""
    row = f.suffixes[suffix]
    row.node, row.prev, row.next = node, 0, f.nodes[node].suffix
    if row.next:
        f.suffixes[row.next].prev = suffix
    f.nodes[node].suffix = suffix


@inlined
def _end_nowhere(f, suffix):
    row = f.suffixes[suffix]
    if row.prev:
        f.suffixes[row.prev].next = row.next
    else:
        f.nodes[row.node].suffix = row.next
    if row.next:
        f.suffixes[row.next].prev = row.prev


@inlined
def _move(f, suffix, node):
    _end_nowhere(f, suffix)
    _end_in(f, suffix, node)


# --- append


@inlined
def _store(f, sequence, token):
    """Write a token behind a sequence; return the suffix that starts there."""
    row, size = f.sequences[sequence], 1 << f.page_bits
    offset = row.length & (size - 1)
    page = _new_page(f, sequence) if offset == 0 else np.int64(row.last_page)
    f.tokens[2 * page * size + offset] = token
    before = np.int64(f.pages[page].prev)
    if before:
        f.tokens[(2 * before + 1) * size + offset] = token
    row.length += 1
    return page * size + offset


@inlined
def _swallow_parent(f, node):
    """Prepend its parent's edge to a node that is the only child, and let it take its place."""
    parent = np.int64(f.nodes[node].parent)
    _free_group(f, f.nodes[node].group)
    f.nodes[node].length += f.nodes[parent].length
    f.nodes[node].label -= f.nodes[parent].length
    _replace(f, parent, node)
    _free_node(f, parent)


@inlined
def _behead(f, node, parent):
    """Take the first token off an edge."""
    row = f.nodes[node]
    row.parent = parent
    row.label += 1
    row.length -= 1
    row.token = f.tokens[row.label]


@inlined
def _split(f, node):
    """Give the first token of an edge a node of its own; return that."""
    row = f.nodes[node]
    upper = _new_node(f, row.parent, row.token, 1, row.label, row.count)
    _replace(f, node, upper)
    _behead(f, node, upper)
    _link(f, node, 0)
    _new_group(f, node)
    return upper


@inlined
def _lengthen(f, suffix, label):
    """Append to a suffix the token at `label`, which is the end of its tokens."""
    token = f.tokens[label]
    node = np.int64(f.suffixes[suffix].node)
    row = f.nodes[node]
    is_root = row.parent == 0
    child = _find_child(f, node, token)
    if child == 0:
        child = _new_node(f, node, token, 1, label, 1)
        _add_child(f, child)
        _move(f, suffix, child)
    elif row.count == f.nodes[child].count + 1 and not is_root:
        # Nothing else ends here: the two become one edge, or the border between them moves.
        if f.nodes[child].length == 1:
            _move(f, suffix, child)
            _swallow_parent(f, child)
        else:
            row.length += 1
            _behead(f, child, node)
    else:
        if f.nodes[child].length > 1:
            child = _split(f, child)
        _increment(f, child)
        _move(f, suffix, child)


@inlined
def _append(f, sequence, token):
    """Append a token to a sequence and to each of its last `max_depth` suffixes."""
    suffix = _store(f, sequence, token)
    row = f.sequences[sequence]
    f.nodes[row.root].count += 1
    _end_in(f, suffix, row.root)
    start = max(0, row.length - f.max_depth)
    # What was said once is a leaf, and so is all that is longer: the first ones just grow.
    while start < row.length - 1:
        leaf = f.nodes[f.suffixes[_suffix(f, sequence, start)].node]
        if leaf.count > 1:
            break
        leaf.length += 1
        start += 1
    for rest in range(start, row.length):
        suffix = _suffix(f, sequence, rest)
        _lengthen(f, suffix, _text(f, suffix) + row.length - 1 - rest)


@compiled
def extend(addresses, tokens, spans):
    """Append `tokens[begin:end]` to a sequence for each row (sequence, begin, end) of `spans`.

    Returns false when a pool is too small for the next token; `begin` then says what is left.
    """
    f = _forest(addresses)
    pools = f.pools[0]
    for i in range(spans.shape[0]):
        sequence, begin, end = spans[i, 0], spans[i, 1], spans[i, 2]
        for t in range(begin, end):
            # Each suffix makes one node at most.
            if pools.used_node + f.max_depth >= f.nodes.size or pools.used_page + 1 >= f.pages.size:
                spans[i, 1] = t
                return False
            _append(f, sequence, tokens[t])
        spans[i, 1] = end
    return True


# --- remove


@inlined
def _forget(f, suffix, length):
    """Count a suffix of `length` tokens no more."""
    _end_nowhere(f, suffix)
    node = np.int64(f.sequences[f.pages[suffix >> f.page_bits].sequence].root)
    f.nodes[node].count -= 1
    label, depth = _text(f, suffix), 0
    while depth < length:
        child = _find_child(f, node, f.tokens[label + depth])
        if f.nodes[child].count == 1:
            _remove_child(f, child)
            break
        _decrement(f, child)
        depth += f.nodes[child].length
        node = child
    only = f.nodes[node].first
    if f.nodes[node].parent and only and f.nodes[only].count == f.nodes[node].count:
        _swallow_parent(f, only)


@inlined
def _relabel(f, suffix, length):
    """Let no node on the way of a forgotten suffix read the tokens of its sequence."""
    sequence = f.pages[suffix >> f.page_bits].sequence
    node = np.int64(f.sequences[sequence].root)
    label, depth = _text(f, suffix), 0
    while depth < length:
        node = _find_child(f, node, f.tokens[label + depth])
        if node == 0:
            break
        if _owner(f, f.nodes[node].label) == sequence:
            below = node
            while f.nodes[below].suffix == 0:
                below = np.int64(f.nodes[below].first)
            f.nodes[node].label = _text(f, np.int64(f.nodes[below].suffix)) + depth
        depth += f.nodes[node].length


@compiled
def remove(addresses, sequence):
    """Take a sequence out of its tree, suffix by suffix from the longest, and free it."""
    f = _forest(addresses)
    size = 1 << f.page_bits
    length = f.sequences[sequence].length
    for again in range(2):
        page = np.int64(f.sequences[sequence].first_page)
        for start in range(length):
            suffix = page * size + (start & (size - 1))
            if again:
                _relabel(f, suffix, min(f.max_depth, length - start))
            else:
                _forget(f, suffix, min(f.max_depth, length - start))
            if start & (size - 1) == size - 1:
                page = np.int64(f.pages[page].next)
    _free_sequence(f, sequence)


@compiled
def fell(addresses, sequence):
    """Free a sequence and its whole tree, which has no other one."""
    f = _forest(addresses)
    root = np.int64(f.sequences[sequence].root)
    node = root
    while node:
        if f.nodes[node].first:
            node = np.int64(f.nodes[node].first)
            continue
        parent = np.int64(f.nodes[node].parent)
        if node == root:
            _free_node(f, node)
        else:
            _remove_child(f, node)
        node = parent
    _free_sequence(f, sequence)


# --- match and draft


@inlined
def _walk(f, root, context, start):
    """Match `context[start:]` from the root; return a node and the tokens used of its edge.

    Node 0 if there is no match.
    """
    node, used, label = np.int64(root), np.int64(0), np.int64(0)
    for i in range(start, context.size):
        if used == f.nodes[node].length:
            node = _find_child(f, node, context[i])
            if node == 0:
                return node, used
            used = np.int64(1)
            label = np.int64(f.nodes[node].label)
        elif f.tokens[label + used] == context[i]:
            used += 1
        else:
            return np.int64(0), used
    return node, used


@inlined
def _known_suffixes(f, sequence, context):
    """How many of the shortest suffixes of the context are suffixes of the sequence: all or none.

    Those of a sequence's end need no search: its suffixes know where they end.
    """
    if sequence == 0:
        return 0
    count = min(context.size, f.sequences[sequence].length)
    if count == 0:
        return 0
    count = min(count, f.max_depth)
    label = _text(f, _suffix(f, sequence, f.sequences[sequence].length - count))
    for i in range(count):
        if f.tokens[label + i] != context[context.size - count + i]:
            return 0
    return count


@inlined
def _matches(f, root, sequence, context, nodes, used):
    """Match the last 1, 2, … tokens of the context, but never all; return how many matched.

    Writes for each of these matches its node and the tokens used of that node's edge.
    """
    if root == 0:
        return 0
    known = _known_suffixes(f, sequence, context)
    for m in range(1, context.size):
        if m <= known:
            suffix = _suffix(f, sequence, f.sequences[sequence].length - m)
            nodes[m] = f.suffixes[suffix].node
            used[m] = f.nodes[nodes[m]].length
        else:
            nodes[m], used[m] = _walk(f, root, context, context.size - m)
            if nodes[m] == 0:
                return m - 1
    return context.size - 1


@inlined
def _path(f, node, used, budget, min_prob, token_ids, parents, probs):
    """Follow the most frequent continuation; return the number of tokens and their score."""
    prob, score, count = np.float32(1), np.float32(0), 0
    while count < budget and prob >= min_prob:
        row = f.nodes[node]
        if used < row.length:
            token_ids[count] = f.tokens[row.label + used]
            parents[count] = count - 1
            probs[count] = prob
            score += prob
            count += 1
            used += 1
        elif row.first:
            prob *= np.float32(f.nodes[row.first].count) / np.float32(row.count)
            node, used = np.int64(row.first), np.int64(0)
        else:
            break
    return count, score


@inlined
def _sift_up(heap, place, prob, parent, node, used):
    while place > 0 and heap[(place - 1) // 2].prob < prob:
        heap[place] = heap[(place - 1) // 2]
        place = (place - 1) // 2
    row = heap[place]
    row.prob, row.parent, row.node, row.used = prob, parent, node, used


@inlined
def _pop(heap, size):
    """Remove the top of a heap of `size`: the hole sinks to a leaf, then the last one rises.

    That, and preferring the right one of two equal children, is how C++ libraries do it, so that
    equal probabilities come in the order in which users of the original get them.
    """
    prob, parent = heap[size - 1].prob, heap[size - 1].parent
    node, used = heap[size - 1].node, heap[size - 1].used
    hole, size = 0, size - 1
    while 2 * hole + 1 < size:
        child = 2 * hole + 2
        if child == size or heap[child].prob < heap[child - 1].prob:
            child -= 1
        heap[hole] = heap[child]
        hole = child
    if size:
        _sift_up(heap, hole, prob, parent, node, used)
    return size


@inlined
def _tree(f, node, used, budget, min_prob, token_ids, parents, probs, heap):
    """Take the most probable tokens of all continuations; return number, score and the heap."""
    score, count, size = np.float32(0), 0, 0
    if budget > 0:
        _sift_up(heap, 0, np.float32(1), -1, node, used)
        size = 1
    while count < budget and size:
        prob, parent = heap[0].prob, heap[0].parent
        node, used = np.int64(heap[0].node), heap[0].used
        size = _pop(heap, size)
        row = f.nodes[node]
        if used < row.length:
            token_ids[count] = f.tokens[row.label + used]
            parents[count] = parent
            probs[count] = prob
            score += prob
            _sift_up(heap, size, prob, count, node, used + 1)
            count += 1
            size += 1
            continue
        child = np.int64(row.first)
        while child:
            child_prob = prob * np.float32(f.nodes[child].count) / np.float32(row.count)
            if child_prob < min_prob:
                break  # the siblings behind it are not more frequent
            if size + 1 >= heap.size:
                larger = np.empty(2 * heap.size, heap.dtype)
                larger[:size] = heap[:size]
                heap = larger
            _sift_up(heap, size, child_prob, parent, child, 0)
            size += 1
            child = np.int64(f.nodes[child].next)
    return count, score, heap


@inlined
def _budget(match_len, limit, factor, offset):
    """How many tokens to draft after a match, in float32 as the original computes it."""
    wanted = np.float32(match_len) * factor + offset + np.float32(1e-6)
    if wanted >= limit:  # also what is too large for an integer
        return limit
    return np.int64(wanted) if wanted > 0 else np.int64(0)


@compiled
def speculate(
    addresses,
    contexts,
    queries,
    factor,
    offset,
    min_prob,
    use_tree,
    token_ids,
    parents,
    probs,
    drafts,
):
    """Draft for each of B contexts from a local and a shared tree; the higher score wins.

    Args:
        addresses: of the forest.
        contexts: `[B, max_depth]` int32, each at the end of its row.
        queries: `[B, 6]` int64: tokens of the context; most tokens of the draft; root of the local
            tree, and its sequence that may end like the context; the same of the shared tree. 0 for
            none.
        factor: most tokens of a draft for each one matched ...
        offset: ... and beside those.
        min_prob: tokens less probable are not drafted.
        use_tree: draft a tree, not a path.
        token_ids: with `parents`, `probs` and `drafts` what is written: `Outputs`.
        parents: see there.
        probs: see there.
        drafts: see there.
    """
    f = _forest(addresses)
    factor, offset, min_prob = np.float32(factor), np.float32(offset), np.float32(min_prob)
    most = token_ids.shape[1]
    nodes, used = np.empty(f.max_depth, np.int64), np.empty(f.max_depth, np.int64)
    heap = np.empty(64, CANDIDATE)
    new_ids, new_parents = np.empty(most, np.int32), np.empty(most, np.int32)
    new_probs = np.empty(most, np.float32)
    for i in range(queries.shape[0]):
        context = contexts[i, f.max_depth - queries[i, 0] :]
        limit = min(queries[i, 1], most)
        best = drafts[i]
        best.num_tokens, best.match_len, best.score = 0, 0, -1
        for root, sequence in ((queries[i, 2], queries[i, 3]), (queries[i, 4], queries[i, 5])):
            # From the longest match down: of equal scores the longer match's is kept, and one that
            # may draft no more tokens than the best score need not be looked at.
            for m in range(_matches(f, root, sequence, context, nodes, used), 0, -1):
                budget = _budget(m, limit, factor, offset)
                if np.float32(budget) <= best.score:
                    continue
                if use_tree:
                    count, score, heap = _tree(
                        f,
                        nodes[m],
                        used[m],
                        budget,
                        min_prob,
                        new_ids,
                        new_parents,
                        new_probs,
                        heap,
                    )
                else:
                    count, score = _path(
                        f, nodes[m], used[m], budget, min_prob, new_ids, new_parents, new_probs
                    )
                if score > best.score:
                    best.num_tokens, best.match_len, best.score = count, m, score
                    token_ids[i, :count] = new_ids[:count]
                    parents[i, :count] = new_parents[:count]
                    probs[i, :count] = new_probs[:count]
            best.score = max(best.score, np.float32(0))  # an empty local draft beats a shared one
