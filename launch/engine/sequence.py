"""One request on its way through a rank's scheduler, and the table of running ones as arrays.

Knows no queues and no model. A sequence has tokens (prompt and generated), of which some have their KV in the pool. Its next
forward computes the rest, and its last row gives the next token; so decoding is just the case where one token is missing, and a
retracted sequence resumes like a new one with a longer prompt, unless its KV was kept.

Forwards are launched before the results of the one before are in. What is launched counts at once: the token that a launched row
will give is one of the sequence's tokens, its value not yet known. "Settled" is what results have come back for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesaic.attention.prefix_cache import Node
from moesaic.launch.engine.messages import GenerateRequest, SamplingParams, TokenLogprobs
from moesaic.launch.engine.penalties import TokenHistory
from moesaic.launch.engine.retraction import KeptKV

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

MAX_TABLE_STOPS = 8
"""Stop ids that the table compares for all sequences at once; a sequence with more is looked at one by one."""


@dataclass(slots=True, eq=False)
class Sequence:
    """`slot` is its row in the table, -1 while it waits. While it runs, its tokens and their number are the table's;
    `SequenceTable.sequence` brings `num_tokens` and `num_settled` here up to date, and `tokens` is the table's row.

    num_tokens: whose values are known. num_computed: prompt tokens whose forward is launched. num_settled: tokens whose KV is
    in the pool for certain, what may be shared. arrival: unique. shares: its pages may go to the prefix cache; not while another
    instance reads or writes them. kept: while it waits, its KV in host memory; it goes on as soon as it has pages.
    `added_at` and `admitted_at` (seconds, monotonic) are for reports only: the ranks of a DP group must not decide by clocks.
    """

    rid: int
    request: GenerateRequest
    tokens: Int32Array
    num_prompt: int
    num_tokens: int
    arrival: int
    node: Node | None = None
    num_computed: int = 0
    num_settled: int = 0
    cached_tokens: int = -1
    slot: int = -1
    stop_ids: frozenset[int] = frozenset()
    history: TokenHistory | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_output_sent: bool = False
    shares: bool = True
    kept: KeptKV | None = None
    added_at: float = 0.0
    admitted_at: float = 0.0

    @staticmethod
    def from_request(request: GenerateRequest, arrival: int) -> Sequence:
        """A sequence that has not run yet."""
        num_prompt = len(request.input_ids)
        return Sequence(
            rid=request.rid,
            request=request,
            tokens=np.array(request.input_ids, dtype=np.int32),
            num_prompt=num_prompt,
            num_tokens=num_prompt,
            arrival=arrival,
            stop_ids=frozenset(request.sampling.stop_token_ids),
            history=_history(request),
            added_at=time.monotonic(),
        )

    @property
    def max_tokens(self) -> int:
        return self.num_prompt + self.request.sampling.max_new_tokens

    @property
    def min_tokens(self) -> int:
        return self.num_prompt + self.request.sampling.min_new_tokens

    @property
    def precedence(self) -> tuple[int, int]:
        """Sorts by who goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.arrival)

    @property
    def matchable_tokens(self) -> int:
        """How much of it a cached prefix may replace: the last token must run, and prompt logprobs need their own rows."""
        limit = self.num_tokens - 1
        if self.request.logprob_start_len >= 0 and not self.first_output_sent:
            limit = min(limit, max(self.request.logprob_start_len - 1, 0))
        return limit


class SequenceTable:
    """Running sequences as arrays over slots, so that a step touches Python objects only where something happens.

    pages int32 [capacity, max_pages]: page rows; tokens int32 [capacity, max_tokens + 1]; the rest [capacity]. num_tokens: with
    those that launched rows will give; num_known: without them; num_prompt: of these; num_found: what the prefix cache had of them.
    owner: the sequence's arrival, -1 for a free slot. needs_event: the next token needs an output of its own even if it is neither
    the last nor a stop id.
    """

    def __init__(self, capacity: int, max_pages: int, max_tokens: int) -> None:
        self._sequences: list[Sequence | None] = [None] * capacity
        self.tokens: Int32Array = np.empty((capacity, max_tokens + 1), dtype=np.int32)
        self.rid: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.owner: Int64Array = np.full(capacity, -1, dtype=np.int64)
        self.stop_ids: Int64Array = np.full((capacity, MAX_TABLE_STOPS), -1, dtype=np.int64)
        self.needs_event = np.zeros(capacity, dtype=np.bool_)
        self.pages: Int32Array = np.zeros((capacity, max_pages), dtype=np.int32)
        self.num_pages: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.num_tokens: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.num_known: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.num_prompt: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.num_found: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.max_tokens: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.temperature = np.zeros(capacity, dtype=np.float32)
        self.top_p = np.ones(capacity, dtype=np.float32)
        self.min_p = np.zeros(capacity, dtype=np.float32)
        self.top_k: Int64Array = np.full(capacity, -1, dtype=np.int64)
        self.seed: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.min_tokens: Int64Array = np.zeros(capacity, dtype=np.int64)
        self.wants_logprobs = np.zeros(capacity, dtype=np.bool_)
        self.needs_history = np.zeros(capacity, dtype=np.bool_)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def add(self, sequence: Sequence, pages: Int32Array, num_found: int) -> None:
        """Give a sequence a slot and its first pages, with `num_found` tokens from the prefix cache in them."""
        slot = self._free.pop()
        sampling = sequence.request.sampling
        sequence.slot = slot
        self._sequences[slot] = sequence
        self.tokens[slot, : sequence.num_tokens] = sequence.tokens[: sequence.num_tokens]
        sequence.tokens = self.tokens[slot]
        self.rid[slot] = sequence.rid
        self.owner[slot] = sequence.arrival
        stops = sampling.stop_token_ids[:MAX_TABLE_STOPS]
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stops)] = stops
        self.needs_event[slot] = True
        self.pages[slot, : len(pages)] = pages
        self.num_pages[slot] = len(pages)
        self.num_tokens[slot] = self.num_known[slot] = sequence.num_tokens
        self.num_prompt[slot], self.num_found[slot] = sequence.num_prompt, num_found
        self.max_tokens[slot] = sequence.max_tokens
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.top_k[slot] = sampling.top_k
        self.seed[slot] = sampling.seed
        self.min_tokens[slot] = sequence.min_tokens
        self.wants_logprobs[slot] = sequence.request.return_logprob
        self.needs_history[slot] = sequence.history is not None

    def remove(self, sequence: Sequence) -> Int32Array:
        """Take a sequence out; returns its page row (a copy)."""
        slot = sequence.slot
        self.sequence(slot)
        sequence.tokens = sequence.tokens[: sequence.num_tokens].copy()
        row = self.page_row(slot).copy()
        self._sequences[slot] = None
        self.owner[slot] = -1
        self.num_pages[slot] = 0
        self._free.append(slot)
        sequence.slot = -1
        return row

    def page_row(self, slot: int) -> Int32Array:
        """The pages of a slot, a view."""
        return self.pages[slot, : self.num_pages[slot]]

    def sequence(self, slot: int) -> Sequence:
        """The sequence in a slot that is in use, brought up to date with what has been settled."""
        found = self._sequences[slot]
        assert found is not None, f"slot {slot} is empty"
        num_known = int(self.num_known[slot])
        if num_known > found.num_tokens:
            found.num_tokens, found.num_settled = num_known, num_known - 1
        return found

    def launch(self, slots: Int64Array) -> Int64Array:
        """One token more for each of these slots (all distinct), its value not yet known. Returns the tokens' positions."""
        positions = self.num_tokens[slots]
        self.num_tokens[slots] = positions + 1
        return positions

    def settle(self, slots: Int64Array, positions: Int64Array, tokens: Int64Array) -> None:
        """The values of launched tokens are known."""
        self.tokens[slots, positions] = tokens
        self.num_known[slots] = positions + 1


def _history(request: GenerateRequest) -> TokenHistory | None:
    """Token counts for penalties, where the request has any."""
    sampling = request.sampling
    neutral = SamplingParams()
    repeats = sampling.repetition_penalty != neutral.repetition_penalty
    if not repeats and not sampling.frequency_penalty and not sampling.presence_penalty:
        return None
    return TokenHistory(request.input_ids if repeats else ())
