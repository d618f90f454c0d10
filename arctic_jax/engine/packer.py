"""From a `ScheduledBatch` to the one array that a step is given. Host only, no jax.

Owned by the runner. What a running request needs at every step, its blocks and its sampling
parameters, is kept in arrays with a row for each slot, so that a step is packed by a few operations
on whole arrays: a loop over 256 requests that wrote single entries would take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from arctic_jax.batch import UNSEEN_DRAFT, host_views, packed_size
from arctic_jax.request import Request
from arctic_jax.scheduled_batch import Bucket, ScheduledBatch, ScheduledRequest
from arctic_jax.spec_decode import draft_tree


class StepPacker:
    """Packs steps, each knowing the one before.

    Args:
        max_num_seqs: slots.
        max_blocks: of a sequence.
        block_size: tokens of a block.
        vocab_size: of the model.
        max_rows: of a step's output ...
        num_drafted: ... and the tokens of each draft in it.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        vocab_size: int,
        max_rows: int,
        num_drafted: int,
    ) -> None:
        self.max_rows, self.num_drafted = max_rows, num_drafted
        self.max_blocks = max_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self._block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._sampling = {
            "state_row": np.zeros(max_num_seqs, np.int32),
            "temperature": np.zeros(max_num_seqs, np.float32),
            "top_k": np.zeros(max_num_seqs, np.int32),
            "top_p": np.zeros(max_num_seqs, np.float32),
            "min_p": np.zeros(max_num_seqs, np.float32),
            "presence_penalty": np.zeros(max_num_seqs, np.float32),
            "frequency_penalty": np.zeros(max_num_seqs, np.float32),
            "repetition_penalty": np.zeros(max_num_seqs, np.float32),
            "seed": np.zeros((max_num_seqs, 2), np.int32),
        }
        # Whose row it is, and how often that request was preempted: then it has other blocks.
        self._owner: list[tuple[Request | None, int]] = [(None, 0)] * max_num_seqs
        # Of the step packed last: which part each request had; the drafted tokens and the last row
        # of each part; the rows of a round, and how many rounds it had.
        self._before: dict[Request, int] = {}
        self._drafted_before = self._rows_before = np.zeros(0, np.int64)
        self._stride_before, self._rounds_before = 0, 1

    def pack(self, scheduled: ScheduledBatch, bucket: Bucket) -> np.ndarray:
        """Write a step into a new array, in the bucket's shape."""
        parts, size = scheduled.requests, self.block_size
        requests = [part.request for part in parts]
        for request in requests:
            self._refresh(request)
        n = len(parts)
        slots = np.array([request.slot for request in requests])
        starts = np.array([part.start for part in parts])
        lengths = np.array([part.num_tokens for part in parts])
        rows = np.array([part.num_rows for part in parts])
        samples = np.array([part.samples for part in parts])
        drafted = np.array([part.num_drafted for part in parts])
        rounds = np.array([part.num_rounds for part in parts])
        pending = np.array([request.num_pending for request in requests])
        answered = np.array([len(request.output_token_ids) for request in requests])
        first_masks = np.array([part.first_mask for part in parts])
        seqs, seq_ends, row_ends = np.arange(n), np.cumsum(lengths), np.cumsum(rows)
        T, R = seq_ends[-1], row_ends[-1]
        seq = np.repeat(seqs, lengths)
        places = np.arange(T) + (starts - seq_ends + lengths)[seq]  # in the cache

        packed = np.zeros(packed_size(bucket, self.max_blocks), np.int32)
        views = host_views(packed, bucket, self.max_blocks)
        views["token_ids"][:T] = _token_ids(parts)
        views["token_source"][:] = -1
        # Of these the step before draws the last known token.
        followers = np.flatnonzero(pending > (samples + drafted) * rounds)
        self._follow(parts, followers, (seq_ends - drafted)[followers], views)
        views["positions"][:T] = places
        views["slot_mapping"][T:] = -1
        blocks = self._block_tables[slots[seq], places // size]
        views["slot_mapping"][:T] = blocks * size + places % size
        views["query_start_loc"][1 : n + 1] = seq_ends
        views["query_start_loc"][n + 1 :] = T
        views["seq_lens"][:n] = starts + lengths
        width = max(len(request.block_ids) for request in requests)
        views["block_tables"][:n, :width] = self._block_tables[slots, :width]

        row_seq = np.repeat(seqs, rows)
        views["logit_rows"][:R] = np.arange(R) + (seq_ends - row_ends)[row_seq]
        views["logit_rows"][R:] = -1
        views["row_seq"][:R] = row_seq
        drawn = answered + pending - (rounds - 1) * (1 + drafted)  # after the first round
        views["row_step"][:R] = np.arange(R) + (drawn - row_ends)[row_seq]
        views["row_target"][:R] = -1
        views["row_draft"][:] = -1
        views["row_mask"][:] = -1
        for i in np.flatnonzero((first_masks >= 0) | (rows > samples)).tolist():
            part, end = parts[i], int(row_ends[i])
            if part.first_mask >= 0:
                masks = part.first_mask + np.arange(part.num_draws)
                views["row_mask"][end - part.num_draws : end] = masks
            if part.num_extra_rows:  # each is followed by a token that it predicts or verifies
                after = part.request.token_ids[part.start + part.num_tokens - part.num_rows + 1 :]
                name = "row_draft" if part.num_drafted else "row_target"
                rows_before_last = slice(end - part.num_rows, end - part.samples)
                unseen = [UNSEEN_DRAFT] * part.num_drafted if part.unseen else after
                views[name][rows_before_last] = unseen[: part.num_extra_rows]
        if bucket.has_trees:
            views["draft_mask"][:] = -1
            for part, token_end, row_end in zip(parts, seq_ends, row_ends, strict=True):
                if part.parents:
                    _place_tree(part, token_end, row_end, views)
        for name, values in self._sampling.items():
            views[name][:n] = values[slots]
        views["state_row"][n:] = -1
        views["top_p"][n:] = 1.0
        views["want_logprobs"][...] = any(
            request.params.logprobs is not None or request.wants_prompt_rows for request in requests
        )
        if bucket.num_rounds > 1:
            views["num_rounds"][:n] = rounds
        self._before = dict(zip(requests, range(n), strict=True))
        self._drafted_before = drafted
        self._stride_before, self._rounds_before = bucket.num_rows, scheduled.num_rounds
        self._rows_before = row_ends - 1 + (rounds - 1) * bucket.num_rows
        return packed

    def _follow(
        self,
        parts: Sequence[ScheduledRequest],
        followers: np.ndarray,
        first_drafts: np.ndarray,
        views: dict[str, np.ndarray],
    ) -> None:
        """Say where the device finds tokens that it is still drawing, or has drafted.

        Args:
            parts: of the step.
            followers: the parts that have such tokens.
            first_drafts: the place in the step of each one's first drafted token, after its known
                ones.
            views: of the packed step.
        """
        if not len(followers):
            return
        following = [parts[i] for i in followers.tolist()]
        before = np.array([self._before[part.request] for part in following])
        rows = self._rows_before[before]
        views["token_source"][first_drafts - 1] = rows
        views["before_row"][followers] = rows
        views["before_drafted"][followers] = self._drafted_before[before]
        views["before_stride"][...] = self._stride_before
        views["before_rounds"][...] = self._rounds_before
        first_row = (self._rounds_before - 1) * self._stride_before
        for i in np.flatnonzero([part.unseen for part in following]):
            places = np.arange(following[i].num_drafted)
            drafts = self.max_rows + (first_row + before[i]) * self.num_drafted
            views["token_source"][first_drafts[i] + places] = drafts + places

    def _refresh(self, request: Request) -> None:
        """Bring the request's row up to date."""
        slot, blocks = request.slot, request.block_ids
        owner, preemptions = self._owner[slot]
        if owner is not request or preemptions != request.num_preemptions:
            self._owner[slot] = (request, request.num_preemptions)
            self._num_blocks[slot] = 0
            for name, value in self._parameters(request).items():
                self._sampling[name][slot] = value
        known = self._num_blocks[slot]
        if known < len(blocks):
            self._block_tables[slot, known : len(blocks)] = blocks[known:]
            self._num_blocks[slot] = len(blocks)

    def _parameters(self, request: Request) -> dict[str, object]:
        params = request.params
        return {
            "state_row": request.slot if params.adjusts_logits else -1,
            "temperature": params.temperature,
            "top_k": min(max(params.top_k, 0), self.vocab_size),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "seed": np.array([request.seed], np.int64).view(np.int32),
        }


def _place_tree(
    part: ScheduledRequest, token_end: int, row_end: int, views: dict[str, np.ndarray]
) -> None:
    """Say of drafted tokens where they come in the answer, and what they come after."""
    tokens = slice(token_end - part.num_drafted, token_end)
    rows = slice(row_end - part.num_drafted, row_end)
    depths = np.array(draft_tree.depths(part.parents))
    ahead = np.arange(1, 1 + part.num_drafted) - depths
    views["positions"][tokens] -= ahead
    views["row_step"][rows] -= ahead
    views["draft_mask"][tokens] = draft_tree.draft_masks(part.parents)


def _token_ids(parts: Sequence[ScheduledRequest]) -> list[int]:
    """Return the tokens of all parts, one after the other."""
    if all(part.num_tokens == 1 for part in parts):
        return [part.request.token_ids[part.start] for part in parts]
    return list(
        chain.from_iterable(p.request.token_ids[p.start : p.start + p.num_tokens] for p in parts)
    )
