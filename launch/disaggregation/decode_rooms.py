"""The rooms of a decode rank: preallocation queue, transfer queue, and pages that must rest. See engine/rooms.py.

A request first finds its prefill ranks. Then it gets a slot and pages, in order of arrival and only where running requests keep
room to grow, and prefill is told: until then it waits here, and nobody but its own DP rank is held up. What the prefix cache has is
not fetched. With all pages and the first token there, it decodes in the next step. Pages of a room that has failed are held until
no read that was begun can write to them any more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from enum import Enum, auto

from moesaic.launch.disaggregation.agreement import Sign
from moesaic.launch.disaggregation.handover import Handover, decode_handover
from moesaic.launch.disaggregation.protocol import WARMUP_HOST, TransferState
from moesaic.launch.disaggregation.receiver import DecodeTransfer
from moesaic.launch.disaggregation.receiver_room import ReceiverRoom
from moesaic.launch.disaggregation.room_end import GIVEN_UP, RoomEntry, bootstrap_of, open_room, report_failure
from moesaic.launch.disaggregation.room_list import RoomList
from moesaic.launch.disaggregation.room_reads import TransferStats
from moesaic.launch.disaggregation.transfer import Receiver
from moesaic.launch.engine.messages import GenerateRequest, RoomLoad, TokenLogprobs
from moesaic.launch.engine.plan import Chunk
from moesaic.launch.engine.results import Results
from moesaic.launch.engine.scheduler import Scheduler
from moesaic.launch.engine.sequence import Sequence


class Stage(Enum):
    """SEARCH: the prefill ranks are not reached yet. PREALLOC: it has no pages yet. TRANSFER: pages are being fetched. REST: the
    room has failed, and its pages are held until all reads have ended.
    """

    SEARCH = auto()
    PREALLOC = auto()
    TRANSFER = auto()
    REST = auto()


@dataclass(eq=False, kw_only=True)
class DecodeEntry(RoomEntry[Receiver]):
    """`sequence`: from TRANSFER on."""

    sequence: Sequence | None = None


class DecodeRooms:
    """See engine.rooms.Rooms."""

    def __init__(self, transfer: DecodeTransfer, scheduler: Scheduler, results: Results) -> None:
        self._transfer = transfer
        self._scheduler = scheduler
        self._results = results
        self._rooms: RoomList[DecodeEntry] = RoomList(_see)
        self._num_failed = 0
        self._last: TransferStats | None = None
        self._handover_s = 0.0
        self._placed: list[DecodeEntry] = []

    @property
    def num_open(self) -> int:
        return len(self._rooms)

    def num_unplaced(self) -> tuple[int, int]:
        entries = self._rooms.in_stage(Stage.SEARCH, Stage.PREALLOC)
        return len(entries), sum(len(entry.request.input_ids) for entry in entries)

    def load(self) -> RoomLoad:
        last = self._last
        return RoomLoad(
            num_prealloc=len(self._rooms.in_stage(Stage.SEARCH, Stage.PREALLOC)),
            num_transfer=len(self._rooms.in_stage(Stage.TRANSFER)),
            num_failed=self._num_failed,
            speed_gb_s=last.num_bytes / last.seconds / 1e9 if last is not None and last.seconds else 0.0,
            latency_ms=0.0 if last is None else last.seconds * 1e3,
            handover_ms=self._handover_s * 1e3,
        )

    def take(self, request: GenerateRequest) -> None:
        where = bootstrap_of(request)
        end, refusal = open_room(
            lambda: self._transfer.receiver(where.room, where.host, where.port, where.prefill_dp_rank),
            lambda: self._scheduler.check(request),
        )
        self._rooms.add(DecodeEntry(request=request, stage=Stage.SEARCH, end=end, refusal=refusal))

    def abort(self, rid: int) -> bool:
        entry = self._rooms.get(rid)
        if entry is None:
            return False
        self._give_up(entry, GIVEN_UP)
        return True

    def word(self) -> int:
        self._transfer.thread.check()
        return self._rooms.word()

    def settle(self, words: Many[int], *, forward_runs: bool) -> None:
        self._open_placed()
        for verdict in self._rooms.verdicts(words):
            entry = verdict.entry
            if verdict.failed_rank is not None:
                self._num_failed += 1
                self._give_up(entry, report_failure(self._results, entry, verdict.failed_rank))
            elif entry.stage is Stage.SEARCH:
                entry.stage = Stage.PREALLOC
            elif entry.stage is Stage.TRANSFER:
                self._start(entry)
            else:
                self._rooms.remove(entry)
                self._scheduler.remove(entry.rid)
        self._place()
        if not forward_runs:
            self._open_placed()

    def chunk_settled(self, chunk: Chunk) -> None:
        """Chunks run here when a sequence was sent back: nobody else's business."""

    def hand_over(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> bool:
        return False

    def dropped(self, rid: int, message: str) -> None:
        """The room of a running sequence has ended."""

    def _place(self) -> None:
        for entry in self._rooms.in_stage(Stage.PREALLOC):
            entry.sequence = self._scheduler.place(entry.request)
            if entry.sequence is None:
                return
            entry.stage = Stage.TRANSFER
            self._placed.append(entry)

    def _open_placed(self) -> None:
        """Have pages fetched, now that no forward can write to them: one launched before they were freed is not in a transfer's
        order, as it is in that of later forwards.
        """
        placed, self._placed = self._placed, []
        for entry in placed:
            if entry.stage is Stage.TRANSFER:
                assert entry.sequence is not None and entry.end is not None
                num_cached = entry.sequence.num_settled // self._scheduler.config.page_size
                entry.end.receive(self._scheduler.table.page_row(entry.sequence.slot)[num_cached:], num_cached)

    def _start(self, entry: DecodeEntry) -> None:
        sequence, end = entry.sequence, entry.end
        assert sequence is not None and end is not None
        warmup = bootstrap_of(entry.request).host == WARMUP_HOST
        try:
            handover = Handover(token_id=entry.request.input_ids[-1]) if warmup else decode_handover(end.metadata)
        except ValueError as error:
            self._num_failed += 1
            self._results.transfer_failed(
                entry.rid, "corrupt", f"room {end.room}: what came with the last page is no handover: {error}"
            )
            entry.stage = Stage.REST
            return
        if isinstance(end, ReceiverRoom):
            self._last = end.stats
        self._rooms.remove(entry)
        sequence.shares = not warmup  # the pages of a warm-up hold anything
        sequence.cached_tokens = handover.cached_tokens
        sequence.prompt_logprobs.extend(handover.prompt_logprobs)
        self._scheduler.start_decoding(sequence, handover.token_id)
        self._results.first_token(sequence, handover.token_id, handover.logprobs)
        if handover.computed_at:
            self._handover_s = max(0.0, time.time() - handover.computed_at)

    def _give_up(self, entry: DecodeEntry, reason: str) -> None:
        entry.give_up(reason)
        if entry.sequence is None:
            self._rooms.remove(entry)
        else:
            entry.stage = Stage.REST


def _see(entry: DecodeEntry) -> Sign:
    state = entry.state
    if entry.stage is Stage.REST:
        assert entry.end is not None
        return Sign(moved=entry.end.quiet, failed=False)
    wanted = {Stage.SEARCH: TransferState.WAITING, Stage.TRANSFER: TransferState.SUCCESS}.get(Stage(entry.stage))
    return Sign(moved=wanted is not None and state >= wanted, failed=state is TransferState.FAILED)
