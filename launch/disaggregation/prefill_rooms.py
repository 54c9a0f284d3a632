"""The rooms of a prefill rank: bootstrap queue, the scheduler's own queue and batch, inflight queue. See engine/rooms.py.

A request waits in the bootstrap queue until its decode ranks have opened the room, is computed like any other but for one token
only, and keeps its pages until decode has them all. What a chunk has written is announced as soon as its results are in, while the
next chunk computes. Pages enter the prefix cache at the end: the cache may replace a page by one of the same content, and decode
may be reading it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from enum import Enum, auto

import msgspec

from moesaic.launch.disaggregation.agreement import Sign
from moesaic.launch.disaggregation.handover import Handover, encode_handover
from moesaic.launch.disaggregation.protocol import TransferState
from moesaic.launch.disaggregation.room_end import GIVEN_UP, RoomEntry, bootstrap_of, open_room, report_failure
from moesaic.launch.disaggregation.room_list import RoomList
from moesaic.launch.disaggregation.sender import PrefillTransfer
from moesaic.launch.disaggregation.transfer import Sender
from moesaic.launch.engine.messages import GenerateRequest, RoomLoad, TokenLogprobs
from moesaic.launch.engine.plan import Chunk
from moesaic.launch.engine.results import Results
from moesaic.launch.engine.scheduler import Scheduler
from moesaic.launch.engine.sequence import Sequence


class Stage(Enum):
    """BOOTSTRAP: no decode rank has opened the room. COMPUTE: with the scheduler. INFLIGHT: computed, decode is fetching."""

    BOOTSTRAP = auto()
    COMPUTE = auto()
    INFLIGHT = auto()


@dataclass(eq=False, kw_only=True)
class PrefillEntry(RoomEntry[Sender]):
    """`sequence`: from COMPUTE on. `num_sent`: its pages that have been announced."""

    sequence: Sequence | None = None
    num_sent: int = 0


class PrefillRooms:
    """See engine.rooms.Rooms."""

    def __init__(self, transfer: PrefillTransfer, scheduler: Scheduler, results: Results) -> None:
        self._transfer = transfer
        self._scheduler = scheduler
        self._results = results
        self._rooms: RoomList[PrefillEntry] = RoomList(_see)
        self._num_failed = 0

    @property
    def num_open(self) -> int:
        return len(self._rooms)

    def num_unplaced(self) -> tuple[int, int]:
        entries = self._rooms.in_stage(Stage.BOOTSTRAP)
        return len(entries), sum(len(entry.request.input_ids) for entry in entries)

    def load(self) -> RoomLoad:
        return RoomLoad(
            num_bootstrap=len(self._rooms.in_stage(Stage.BOOTSTRAP)),
            num_inflight=len(self._rooms.in_stage(Stage.INFLIGHT)),
            num_failed=self._num_failed,
        )

    def take(self, request: GenerateRequest) -> None:
        bootstrap, first = bootstrap_of(request), _for_one_token(request)
        end, refusal = open_room(
            lambda: self._transfer.sender(bootstrap.room, bootstrap.host), lambda: self._scheduler.check(first)
        )
        self._rooms.add(PrefillEntry(request=request, stage=Stage.BOOTSTRAP, end=end, refusal=refusal))

    def abort(self, rid: int) -> bool:
        entry = self._rooms.get(rid)
        if entry is None:
            return False
        entry.give_up(GIVEN_UP)
        self._end(entry)
        return True

    def word(self) -> int:
        self._transfer.thread.check()
        return self._rooms.word()

    def settle(self, words: Many[int], *, forward_runs: bool) -> None:
        for verdict in self._rooms.verdicts(words):
            entry = verdict.entry
            if verdict.failed_rank is not None:
                entry.give_up(report_failure(self._results, entry, verdict.failed_rank))
                self._num_failed += 1
                self._end(entry)
            elif entry.stage is Stage.BOOTSTRAP:
                entry.sequence = self._scheduler.add(_for_one_token(entry.request))
                entry.sequence.shares = False
                entry.stage = Stage.COMPUTE
            else:
                assert entry.sequence is not None
                self._results.handed_over(entry.sequence)
                self._end(entry)

    def chunk_settled(self, chunk: Chunk) -> None:
        entry = self._rooms.get(chunk.sequence.rid)
        assert entry is not None and entry.end is not None, "a running sequence has an open room"
        page_size = self._scheduler.config.page_size
        complete = -(-chunk.end // page_size) if chunk.completes else chunk.end // page_size
        row = self._scheduler.table.page_row(chunk.sequence.slot)
        entry.end.send(row[entry.num_sent : complete])
        entry.num_sent = complete

    def hand_over(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> bool:
        entry = self._rooms.get(sequence.rid)
        assert entry is not None and entry.end is not None, "a running sequence has an open room"
        handover = Handover(
            token_id=token,
            cached_tokens=sequence.cached_tokens,
            computed_at=time.time(),
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs),
        )
        entry.end.finish(encode_handover(handover))
        entry.stage = Stage.INFLIGHT
        return True

    def dropped(self, rid: int, message: str) -> None:
        entry = self._rooms.get(rid)
        assert entry is not None, "a running sequence has an open room"
        entry.give_up(message)
        self._rooms.remove(entry)

    def _end(self, entry: PrefillEntry) -> None:
        """Its pages may be reused: decode has them, or knows that it won't get them. What was computed stays cached."""
        self._rooms.remove(entry)
        if entry.sequence is not None:
            entry.sequence.shares = True
            self._scheduler.remove(entry.rid)


def _see(entry: PrefillEntry) -> Sign:
    wanted = {Stage.BOOTSTRAP: TransferState.WAITING, Stage.INFLIGHT: TransferState.SUCCESS}.get(Stage(entry.stage))
    state = entry.state
    return Sign(moved=wanted is not None and state >= wanted, failed=state is TransferState.FAILED)


def _for_one_token(request: GenerateRequest) -> GenerateRequest:
    """What runs here: the prompt, and the first token."""
    sampling = msgspec.structs.replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, 1))
    return msgspec.structs.replace(request, sampling=sampling)
