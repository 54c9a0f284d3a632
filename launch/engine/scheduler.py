"""The scheduler of one DP rank: who waits, who runs, who must step back.

Every step decodes all running sequences and spends its token budget on prompts (chunked prefill), so a long prompt
delays decoding by at most one chunk. It is a function of its messages alone (no clock, no randomness): the attention-TP ranks
of a DP group run the same scheduler on the same messages and stay identical without talking.

Memory: a prompt's pages are allocated when it is admitted, decode pages one by one. Admission leaves room for the growth of running
sequences, estimated as a share (`reserve_ratio`) of what they may still generate; when the estimate was too low, the sequence that
would go last is retracted (its pages stay cached, it waits again, nothing is lost) and the share is raised.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesaic.attention.page_allocator import PageAllocator
from moesaic.attention.prefix_cache import PrefixCache
from moesaic.launch.engine.messages import GenerateRequest
from moesaic.launch.engine.plan import Chunk, Plan
from moesaic.launch.engine.sequence import Int64Array, Sequence, SequenceTable

RESERVE_START, RESERVE_MIN, RESERVE_DECAY = 0.4, 0.05, 0.998
RESERVE_HORIZON_TOKENS = 4096
LPM_WINDOW = 64
"""How many waiting sequences the longest-prefix-match policy looks at; matching costs time."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Tokens and sequences of one DP rank. `chunk_tokens`: prompt tokens at most in one step."""

    num_pages: int
    page_size: int
    max_running: int
    context_length: int
    chunk_tokens: int
    policy: str = "fcfs"
    prefix_cache: bool = True


class Scheduler:
    """Queues and memory of one DP rank. Per step: `schedule`, then (elsewhere) the forward, then `advance` per sampled token."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.cache = PrefixCache(PageAllocator(config.num_pages), config.page_size, config.prefix_cache)
        self.table = SequenceTable(config.max_running, -(-config.context_length // config.page_size), config.context_length)
        self.num_retracted = 0
        self._waiting: list[Sequence] = []
        self._decoding: Int64Array = np.empty(0, dtype=np.int64)
        self._partial: Sequence | None = None
        self._by_rid: dict[int, Sequence] = {}
        self._arrivals = 0
        self._reserve_ratio = RESERVE_START
        self._blocked = False

    # What others may ask

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self.config.max_running - self.table.num_free

    @property
    def num_waiting_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self._waiting)

    @property
    def num_used_tokens(self) -> int:
        """KV tokens that running sequences hold (cached but unused pages don't count)."""
        return (self.config.num_pages - self.cache.available_pages()) * self.config.page_size

    @property
    def capacity_tokens(self) -> int:
        return self.config.num_pages * self.config.page_size

    def has_work(self) -> bool:
        return bool(self._by_rid)

    # Requests come and go

    def add(self, request: GenerateRequest) -> Sequence:
        """Queue a request. Raises ValueError when it could never run, even alone."""
        total = len(request.input_ids) + request.sampling.max_new_tokens
        limit = min(self.capacity_tokens, self.config.context_length)
        if total > limit:
            raise ValueError(
                f"the request needs up to {total} tokens of KV ({len(request.input_ids)} prompt + "
                f"{request.sampling.max_new_tokens} new), this rank has {limit}"
            )
        if request.rid in self._by_rid:
            raise ValueError(f"request id {request.rid} is already running")
        sequence = Sequence.from_request(request, self._arrivals)
        self._arrivals += 1
        self._by_rid[request.rid] = sequence
        self._waiting.append(sequence)
        self._waiting.sort(key=lambda waiting: waiting.precedence)
        self._blocked = False
        return sequence

    def remove(self, rid: int) -> Sequence | None:
        """End a request wherever it is (finished or aborted); its full pages stay cached. None if it is not here."""
        sequence = self._by_rid.pop(rid, None)
        if sequence is None:
            return None
        if sequence.slot >= 0:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        return sequence

    # One step

    def schedule(self) -> Plan:
        """The next step: all decoding sequences, then chunks within the budget."""
        self._make_room_for_decode()
        decode_slots = self._decoding
        return Plan(decode_slots, tuple(self._chunks()))

    def advance_chunk(self, chunk: Chunk) -> None:
        """The chunk's KV is computed. A completed sequence decodes from the next step on; its pages are shared from now on."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.start + chunk.length
        if chunk.completes:
            self._share_pages(sequence)
            self._decoding = np.append(self._decoding, sequence.slot)

    def append_tokens(self, slots: Int64Array, tokens: Int64Array) -> None:
        """One new token for each of these decoding slots (all distinct)."""
        self.table.append(slots, tokens)
        self._reserve_ratio = max(self._reserve_ratio * RESERVE_DECAY, RESERVE_MIN)

    # Memory

    def _make_room_for_decode(self) -> None:
        """A page for every decoding sequence whose next token starts one; retracts sequences while there are too few."""
        page_size = self.config.page_size
        while True:
            slots = self._decoding
            needs = slots[(self.table.num_tokens[slots] - 1) // page_size >= self.table.num_pages[slots]]
            if len(needs) <= self.cache.available_pages():
                break
            self._retract_one()
        if len(needs):
            self.table.pages[needs, self.table.num_pages[needs]] = self.cache.allocate(len(needs))
            self.table.num_pages[needs] += 1

    def _retract_one(self) -> None:
        """Send the running sequence that would go last back to the queue."""
        running = [self.table.sequence(slot) for slot in self._decoding.tolist()]
        if self._partial is not None:
            running.append(self._partial)
        victim = max(running, key=lambda sequence: sequence.precedence)
        assert len(running) > 1, "one sequence alone always fits: add() refuses what can't"
        self._release(victim)
        victim.num_computed = 0
        victim.prompt_logprobs.clear()
        self._waiting.append(victim)
        self._waiting.sort(key=lambda waiting: waiting.precedence)
        self.num_retracted += 1
        self._reserve_ratio = min(1.0, self._reserve_ratio * 2)

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence's slot and pages; what it computed in full pages goes to (or stays in) the cache."""
        slot = sequence.slot
        self.table.sequence(slot)
        if self._partial is sequence:
            self._partial = None
        else:
            self._decoding = self._decoding[self._decoding != slot]
        self._share_pages(sequence)
        row = self.table.remove(sequence)
        assert sequence.node is not None
        owned = sequence.node.depth if self.cache.enabled else 0
        self.cache.allocator.free(row[owned:])
        self.cache.release(sequence.node)
        sequence.node = None
        self._blocked = False

    def _share_pages(self, sequence: Sequence) -> None:
        """Give the full pages computed so far to the prefix cache; duplicates are replaced by the cached ones."""
        assert sequence.node is not None
        row = self.table.page_row(sequence.slot)
        insertion = self.cache.insert(sequence.tokens[: sequence.num_computed], row, sequence.node)
        sequence.node = insertion.node
        if insertion.num_replaced:
            row[:] = insertion.pages

    def _reserved_pages(self) -> int:
        """Pages that running sequences are expected to need."""
        slots = self._decoding
        growth = np.minimum(self.table.max_tokens[slots] - self.table.num_tokens[slots], RESERVE_HORIZON_TOKENS)
        return int(growth.sum() * self._reserve_ratio) // self.config.page_size

    # Admission

    def _chunks(self) -> Iterable[Chunk]:
        budget = self.config.chunk_tokens
        if self._partial is not None:
            sequence = self._partial
            chunk = self._next_chunk(sequence, budget)
            budget -= chunk.length
            yield chunk
        if not self._waiting or self._blocked:
            return
        for sequence in self._admission_order():
            if budget <= 0 or not self.table.num_free or self._partial is not None:
                return
            if not self._admit(sequence):
                self._blocked = True
                return
            chunk = self._next_chunk(sequence, budget)
            budget -= chunk.length
            yield chunk

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        length = min(sequence.num_tokens - sequence.num_computed, budget)
        completes = sequence.num_computed + length == sequence.num_tokens
        self._partial = None if completes else sequence
        return Chunk(sequence, sequence.num_computed, length, completes)

    def _admission_order(self) -> list[Sequence]:
        if self.config.policy == "fcfs" or len(self._waiting) == 1:
            return list(self._waiting)
        window = self._waiting[:LPM_WINDOW]
        hits = {
            sequence.rid: self.cache.peek(sequence.tokens[: sequence.num_tokens], sequence.matchable_tokens) for sequence in window
        }
        order = sorted(window, key=lambda sequence: (-sequence.request.priority, -hits[sequence.rid]))
        return order + self._waiting[LPM_WINDOW:]

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the pages of all its tokens, unless running ones need the room."""
        match = self.cache.match(sequence.tokens[: sequence.num_tokens], sequence.matchable_tokens)
        num_new = -(-sequence.num_tokens // self.config.page_size) - len(match.pages)
        reserve = self._reserved_pages() if self.num_running else 0
        if num_new + reserve > self.cache.available_pages():
            self.cache.release(match.node)
            return False
        self._waiting.remove(sequence)
        self.table.add(sequence, np.concatenate([match.pages, self.cache.allocate(num_new)]))
        sequence.node = match.node
        sequence.num_computed = match.num_tokens
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = match.num_tokens
            sequence.admitted_at = time.monotonic()
        return True
