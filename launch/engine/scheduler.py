"""The scheduler of one DP rank: who waits, who runs, who must step back.

Every step decodes all running sequences and spends its token budget on prompts (chunked prefill), so a long prompt
delays decoding by at most one chunk. It is a function of its messages alone (no clock, no randomness): the attention-TP ranks
of a DP group run the same scheduler on the same messages and stay identical without talking.

A step is launched before the results of the one before are known. `launch` therefore counts what is certain (KV is written, every
sampled row gives a token), `settle_*` bring the values in. A sequence whose launched tokens reach its maximum is not scheduled
again.

Its parts: the queue (`waiting_queue.py`), who runs (`running_set.py`), their memory (`running_memory.py`). When memory runs out,
the sequence that would go last steps back (`stepping_back.py`). A sequence whose prompt another instance computes is *placed* first
(slot and pages, but in no step) and decodes from `start_decoding` on. Pages enter the prefix cache when the results of their
forward are in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesaic.attention.page_allocator import PageArray
from moesaic.launch.engine.messages import GenerateRequest
from moesaic.launch.engine.plan import Chunk, Launch, Plan
from moesaic.launch.engine.retraction import KVKeeper, Restoration
from moesaic.launch.engine.running_memory import RunningMemory
from moesaic.launch.engine.running_set import RunningSet
from moesaic.launch.engine.sequence import Int64Array, Sequence
from moesaic.launch.engine.stepping_back import SteppingBack
from moesaic.launch.engine.waiting_queue import WaitingQueue


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Tokens and sequences of one DP rank. `chunk_tokens`: prompt tokens at most in one step. `growth_tokens`: see `growth.py`."""

    num_pages: int
    page_size: int
    max_running: int
    context_length: int
    chunk_tokens: int
    policy: str = "fcfs"
    prefix_cache: bool = True
    growth_tokens: int = 0


class Scheduler:
    """Queues and memory of one DP rank. Per step: `schedule`, `launch`, and once the forward's results are in, `settle_*`."""

    def __init__(self, config: SchedulerConfig, keeper: KVKeeper | None = None) -> None:
        """`keeper`: None where what is retracted is always computed again."""
        self.config = config
        memory = RunningMemory(config)
        self.memory, self.cache, self.table = memory, memory.cache, memory.table
        self._running = RunningSet(memory.table)
        self._waiting = WaitingQueue(config.policy, memory.cache)
        self._stepping_back = SteppingBack(memory, config.page_size, keeper)
        self._known_tokens: dict[int, int] = {}
        self._by_rid: dict[int, Sequence] = {}
        self._arrivals = 0
        self._blocked = False

    # What others may ask

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return self.config.max_running - self.table.num_free

    @property
    def num_retracted(self) -> int:
        """How often a sequence has stepped back."""
        return self._stepping_back.num_retracted

    @property
    def num_waiting_tokens(self) -> int:
        return self._waiting.num_tokens

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

    def check(self, request: GenerateRequest) -> None:
        """Raises ValueError when the request could never run, even alone."""
        total = len(request.input_ids) + request.sampling.max_new_tokens
        limit = min(self.capacity_tokens, self.config.context_length)
        if total > limit:
            raise ValueError(
                f"the request needs up to {total} tokens of KV ({len(request.input_ids)} prompt + "
                f"{request.sampling.max_new_tokens} new), this rank has {limit}"
            )
        if request.rid in self._by_rid:
            raise ValueError(f"request id {request.rid} is already running")

    def add(self, request: GenerateRequest) -> Sequence:
        """Queue a request. Raises ValueError as `check` does."""
        sequence = self._take_in(request)
        self._waiting.add(sequence)
        self._blocked = False
        return sequence

    def _take_in(self, request: GenerateRequest) -> Sequence:
        self.check(request)
        sequence = Sequence.from_request(request, self._arrivals)
        self._arrivals += 1
        self._by_rid[request.rid] = sequence
        return sequence

    def remove(self, rid: int) -> Sequence | None:
        """End a request wherever it is (finished or aborted); its settled full pages stay cached. None if it is not here."""
        sequence = self._take_out(rid)
        if sequence is not None and sequence.slot >= 0:
            self.memory.share(sequence)
            self._release(sequence)
        return sequence

    def finish(self, rid: int) -> Sequence | None:
        """`remove` for a request that ends by itself: its length says how long others may get."""
        sequence = self.remove(rid)
        if sequence is not None:
            self.memory.growth.ended(sequence.num_tokens - sequence.num_prompt)
        return sequence

    def drop(self, rid: int) -> PageArray:
        """End a running request whose KV can't be trusted: none of it is shared. Returns the freed pages, int32 [n]."""
        sequence = self._take_out(rid)
        assert sequence is not None and sequence.slot >= 0, f"request {rid} is not running"
        return self._release(sequence)

    def place(self, request: GenerateRequest) -> Sequence | None:
        """Slot and pages for a request whose prompt is computed elsewhere; None while there is no room beside running ones' growth.

        `num_settled` says how much of the prompt is cached here. The request has passed `check`.
        """
        if self._waiting or not self.table.num_free:
            return None  # those that were sent back go first
        sequence = self._take_in(request)
        if self.memory.allocate(sequence, sequence.num_tokens, self._running.growing()):
            sequence.shares = False
            self._running.place(sequence.slot)
            return sequence
        del self._by_rid[request.rid]
        return None

    def start_decoding(self, sequence: Sequence, token: int) -> None:
        """The whole prompt of a placed sequence has its KV; `token` is the first that was generated."""
        slot, table = sequence.slot, self.table
        sequence.num_computed = sequence.num_tokens
        table.settle(np.array([slot]), table.launch(np.array([slot])), np.array([token]))
        if sequence.history is not None:
            sequence.history.append(token)
        self._running.decode(np.array([slot]))
        self._known_tokens[slot] = token
        self.memory.share(sequence)

    def take_known_tokens(self) -> tuple[Int64Array, Int64Array]:
        """Slots int64 [K] that have begun, since the last call, to decode from a token not sampled there, and the token of each."""
        known, self._known_tokens = self._known_tokens, {}
        return np.array(list(known), dtype=np.int64), np.array(list(known.values()), dtype=np.int64)

    def take_restoration(self) -> Restoration | None:
        """What must be copied back before the next forward, since the last call."""
        return self._stepping_back.take_restoration()

    def _take_out(self, rid: int) -> Sequence | None:
        sequence = self._by_rid.pop(rid, None)
        if sequence is not None and sequence.slot < 0:
            self._waiting.remove(sequence)
            self._stepping_back.forget(sequence)
        return sequence

    # One step

    def must_retract(self) -> bool:
        """Whether `schedule` would send a sequence back now. Before it may, all results must be in (they may end some)."""
        return len(self._starting_a_page()) > self.cache.available_pages()

    def _starting_a_page(self) -> Int64Array:
        return self.memory.starting_a_page(self._running.ready())

    def schedule(self) -> Plan:
        """The next step: all sequences that can decode, then chunks within the budget."""
        self._make_room_for_decode()
        self._resume_kept()
        decode_slots = self._running.ready()
        return Plan(decode_slots, tuple(self._chunks()))

    def launch(self, plan: Plan) -> Launch:
        """The model is given the plan of the last `schedule`. Sequences whose prompt it completes decode from the next step on."""
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.end
        slots = plan.sampled_slots()
        if plan.chunks:
            self._running.decode(slots[plan.num_decode :])
        if len(slots):
            self.memory.growth.went_well()
        return Launch(plan, slots, self.table.owner[slots], self.table.launch(slots))

    def settle_chunk(self, chunk: Chunk) -> None:
        """A launched chunk of a sequence that still runs has its KV. A complete prompt's pages are shared from now on."""
        sequence = chunk.sequence
        sequence.num_settled = chunk.end
        if chunk.completes:
            self.memory.share(sequence)

    def settle_tokens(self, launch: Launch, tokens: Int64Array) -> npt.NDArray[np.bool_]:
        """The tokens int64 [S] of a launch. Returns bool [S]: whose sequence still runs; the others' tokens are not wanted."""
        lives = self.lives(launch)
        self.table.settle(launch.slots[lives], launch.positions[lives], tokens[lives])
        return lives

    def lives(self, launch: Launch) -> npt.NDArray[np.bool_]:
        """bool [S]: which sampled rows of a launch belong to sequences that still run."""
        lives: npt.NDArray[np.bool_] = self.table.owner[launch.slots] == launch.owners
        return lives

    # Memory

    def _make_room_for_decode(self) -> None:
        """A page for every sequence whose next token starts one; retracts sequences while there are too few."""
        while len(needs := self._starting_a_page()) > self.cache.available_pages():
            self._retract_one()
        self.memory.add_page(needs)

    def _retract_one(self) -> None:
        """Send the running sequence that would go last back to the queue. All its tokens must be known."""
        victim = self._running.last()
        self._stepping_back.prepare(victim, keep=victim is not self._running.partial)
        self._release(victim)
        victim.num_computed = 0
        victim.prompt_logprobs.clear()
        self._waiting.add(victim)

    def _release(self, sequence: Sequence) -> PageArray:
        """Take a running sequence's slot and pages. Returns the freed pages."""
        self._running.discard(sequence)
        self._blocked = False
        return self.memory.release(sequence)

    # Admission

    def _resume_kept(self) -> None:
        """Sequences at the head of the queue whose KV was kept decode in this step, where there is room."""
        while (sequence := self._waiting.head) is not None and sequence.kept is not None:
            if not self.table.num_free or self._blocked:
                return
            if self._admit(sequence):
                self._known_tokens[sequence.slot] = self._stepping_back.resume(sequence)
                self._running.decode(np.array([sequence.slot]))
            else:
                self._blocked = True

    def _chunks(self) -> Iterable[Chunk]:
        budget = self.config.chunk_tokens
        if self._running.partial is not None:
            sequence = self._running.partial
            chunk = self._next_chunk(sequence, budget)
            budget -= chunk.length
            yield chunk
        if not self._waiting or self._blocked:
            return
        for sequence in self._waiting.admission_order():
            if budget <= 0 or not self.table.num_free or self._running.partial is not None:
                return
            if sequence.kept is not None:
                continue  # it needs no chunk, and is looked at first in the next step
            if not self._admit(sequence):
                self._blocked = True
                return
            chunk = self._next_chunk(sequence, budget)
            budget -= chunk.length
            yield chunk

    def _next_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        length = min(sequence.num_tokens - sequence.num_computed, budget)
        completes = sequence.num_computed + length == sequence.num_tokens
        self._running.partial = None if completes else sequence
        return Chunk(sequence, sequence.num_computed, length, completes)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the pages of all its tokens, unless running ones need the room."""
        if not self.memory.allocate(sequence, sequence.matchable_tokens, self._running.growing()):
            return False
        self._waiting.remove(sequence)
        return True
