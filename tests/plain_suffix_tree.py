"""Suffix trees as the definition says them, one node a token: slow, short, and what tests go by."""

import itertools

import numpy as np

from arctic_jax.spec_decode import suffix_kernels as kernels
from arctic_jax.spec_decode.suffix_forest import SuffixForest


class Node:
    """One token deeper than its parent; children in the order that drafts follow."""

    def __init__(self, token=None):
        self.token, self.count, self.children = token, 0, []

    def child(self, token):
        return next((child for child in self.children if child.token == token), None)

    def as_tuple(self):
        return (self.token, self.count, tuple(child.as_tuple() for child in self.children))


class PlainTree:
    """Every suffix, cut off after `max_depth` tokens, of every sequence."""

    def __init__(self, max_depth):
        self.max_depth, self.root, self.sequences = max_depth, Node(), {}

    def append(self, sequence, token):
        tokens = self.sequences.setdefault(sequence, [])
        tokens.append(token)
        self.root.count += 1
        for start in range(max(0, len(tokens) - self.max_depth), len(tokens)):
            node = self.root
            for passed in tokens[start:-1]:
                node = node.child(passed)
            if node.child(token) is None:
                node.children.append(Node(token))
            increment(node.children, node.child(token))

    def remove(self, sequence):
        tokens = self.sequences.pop(sequence)
        for start in range(len(tokens)):
            node = self.root
            node.count -= 1
            for token in tokens[start : start + self.max_depth]:
                child = node.child(token)
                if child.count == 1:
                    node.children.remove(child)
                    break
                decrement(node.children, child)
                node = child

    def match(self, tokens):
        node = self.root
        for token in tokens:
            node = node.child(token)
            if node is None:
                return None
        return node

    def speculate(self, context, limit, factor, offset, min_prob):
        """Return (token_ids, probs, score, match_len) of a path."""
        best = ([], [], np.float32(0), 0)
        context = context[-self.max_depth :]
        for m in range(1, len(context)):
            node = self.match(context[-m:])
            if node is None:
                break
            path = follow(node, budget(m, limit, factor, offset), np.float32(min_prob))
            if path[2] >= best[2]:
                best = (*path, m)
        return best

    def speculate_tree(self, context, limit, factor, offset, min_prob):
        """Return (probabilities, the highest first; score; match_len) of a tree."""
        best = ([], np.float32(0), 0)
        context = context[-self.max_depth :]
        for m in range(1, len(context)):
            node = self.match(context[-m:])
            if node is None:
                break
            probs = spread(node, budget(m, limit, factor, offset), np.float32(min_prob))
            score = total(probs)
            if score >= best[1]:
                best = (probs, score, m)
        return best


def increment(siblings, node):
    """Head of its block: to the front of the next block; else to that block's tail."""
    place = siblings.index(node)
    if node.count == 0:
        node.count = 1
        return
    block = [s for s in siblings if s.count == node.count]
    above = [s for s in siblings if s.count == node.count + 1]
    siblings.pop(place)
    heads = block[0] is node
    front = above[0] if heads and above else None
    if front is not None:
        siblings.insert(siblings.index(front), node)
    elif heads:
        siblings.insert(place, node)
    else:
        siblings.insert(siblings.index(block[0]), node)
    node.count += 1


def decrement(siblings, node):
    """Behind its old block, which is in front of the next lower one."""
    last = [s for s in siblings if s.count == node.count][-1]
    place = siblings.index(last)
    siblings.remove(node)
    siblings.insert(place, node)
    node.count -= 1


def budget(m, limit, factor, offset):
    return max(0, min(limit, int(np.float32(m) * np.float32(factor) + np.float32(offset) + 1e-6)))


def total(probs):
    score = np.float32(0)
    for prob in probs:
        score += prob
    return score


def follow(node, most, min_prob):
    tokens, probs, prob = [], [], np.float32(1)
    while len(tokens) < most and node.children:
        child = node.children[0]
        prob = prob * (np.float32(child.count) / np.float32(node.count))
        if prob < min_prob:
            break
        tokens.append(child.token)
        probs.append(prob)
        node = child
    return tokens, probs, total(probs)


def continuations(node, prob, min_prob):
    """All (probability, node) below a node: where counts fall, a new edge begins."""
    for child in node.children:
        below = prob
        if child.count != node.count:
            below = prob * np.float32(child.count) / np.float32(node.count)
            if below < min_prob:
                continue
        yield below, child
        yield from continuations(child, below, min_prob)


def spread(node, most, min_prob):
    found = sorted((prob for prob, _ in continuations(node, np.float32(1), min_prob)), reverse=True)
    return found[:most]


def expanded(forest: SuffixForest, root: int):
    """Check a tree's arrays; return it one node a token, as `Node.as_tuple`."""
    f = forest.arrays
    size = 1 << f.page_bits

    def children(node):
        found, child, before = [], f.nodes[node]["first"], 0
        while child:
            row = f.nodes[child]
            assert row["parent"] == node
            assert row["prev"] == before
            assert row["length"] >= 1
            assert f.tokens[row["label"]] == row["token"]
            assert f.pages[row["label"] // (2 * size)]["sequence"]
            found.append(int(child))
            before, child = child, row["next"]
        assert f.nodes[node]["last"] == before
        counts = [int(f.nodes[child]["count"]) for child in found]
        assert counts == sorted(counts, reverse=True)
        for first, second in itertools.pairwise(found):
            same = f.nodes[first]["count"] == f.nodes[second]["count"]
            assert same == (f.nodes[first]["group"] == f.nodes[second]["group"])
        for child in found:
            group = f.groups[f.nodes[child]["group"]]
            block = [c for c in found if f.nodes[c]["count"] == f.nodes[child]["count"]]
            assert (group["head"], group["tail"]) == (block[0], block[-1])
            assert np.count_nonzero(f.table == child) == (len(found) > 1)
        return found

    def ends(node):
        count, suffix, before = 0, f.nodes[node]["suffix"], 0
        while suffix:
            assert f.suffixes[suffix]["node"] == node
            assert f.suffixes[suffix]["prev"] == before
            before, suffix, count = suffix, f.suffixes[suffix]["next"], count + 1
        return count

    def expand(node):
        row, below = f.nodes[node], children(node)
        number = int(row["count"])
        assert number == ends(node) + sum(int(f.nodes[child]["count"]) for child in below)
        if node != root:
            assert len(below) != 1 or ends(node), "two edges that should be one"
        tree = (None, number, tuple(expand(child) for child in below))
        label = f.tokens[row["label"] : row["label"] + row["length"]].tolist()
        for token in reversed(label):
            tree = (token, number, tree[2])
            tree = (None, number, (tree,))
        return tree[2][0] if label else tree

    return expand(root)


def used(forest: SuffixForest) -> dict[str, int]:
    """Rows in use of each pool."""
    return {
        pool: int(forest.arrays.pools[f"used_{pool}"][0])
        for pool in ("node", "group", "page", "sequence")
    }


def compiled_versions() -> list[int]:
    """How often each function was compiled for."""
    names = ("new_root", "new_sequence", "fill_table", "extend", "remove", "fell", "speculate")
    return [len(getattr(kernels, name).signatures) for name in names]
