"""The HTTP process's view of the engine: which ranks there are, which sequences are in flight, and whether all is well.

Every sequence goes to all ranks of one DP group, in one order for all of them, because the ranks of a group must see
the same messages; all other ranks are woken to keep the lockstep. Knows nothing of text, HTTP or sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from moesaic.launch.engine.messages import (
    AbortRequest,
    Control,
    ControlReply,
    FromRank,
    GenerateRequest,
    Heartbeat,
    LoadReport,
    ProfileOptions,
    Progress,
    RankError,
    Ready,
    RequestOutput,
    StepOutputs,
    Wake,
    every_output,
)
from moesaic.launch.http.balance import Balancer, no_load
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.control import Command, ControlCalls
from moesaic.launch.http.errors import EngineFailedError
from moesaic.launch.http.health import HealthMonitor
from moesaic.launch.http.sockets import RankGoneError, RankSockets

logger = logging.getLogger(__name__)

# A rank's error may only be the echo of another rank's death: the launcher, which sees the processes, gets this long to name it.
BLAME_SECONDS = 0.4

WATCH_INTERVAL = 0.25
# No answer is awaited, so any id but 0 ("no command") that all ranks get will do.
SHUTDOWN_ID = 1 << 62

# What a sequence's consumer reads: its rid with what a step added, or the failure of the engine.
Arrivals = asyncio.Queue[tuple[int, RequestOutput | EngineFailedError]]


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    name: str
    dp_rank: int
    arrivals: Arrivals


class RankClient:
    """Binds its sockets in the constructor. `wait_ready` starts it on the running loop; `close` ends it."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self._sockets = RankSockets(config.to_rank_endpoints, config.from_rank_endpoint)
        self._balancer = Balancer(config.load_balance_method, config.dp_size)
        self.health = HealthMonitor(
            config.world_size,
            heartbeat_deadline=config.heartbeat_deadline,
            watchdog_timeout=config.watchdog_timeout,
        )
        self.ready: dict[int, Ready] = {}
        self.last_output_at = 0.0
        self._in_flight: dict[int, _InFlight] = {}
        self._rids = itertools.count(1)
        self._control = ControlCalls(config.dp_size)
        self._failure: str | None = None
        self._closing: str | None = None
        self._failed = asyncio.Event()
        self._changed = asyncio.Event()
        self._serving = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._on_progress: Callable[[Progress | Ready], None] = lambda _message: None

    # Start and end

    async def wait_ready(
        self, deadline: float, on_progress: Callable[[Progress | Ready], None] = lambda _message: None
    ) -> list[Ready]:
        """Wait until every rank is ready and connected; their Ready messages by rank.

        Raises EngineFailedError when a rank reports an error, when `fail` is called, or after `deadline` seconds.
        """
        self._loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self._tasks.append(asyncio.create_task(self._receive(), name="receive from ranks"))
        started = time.monotonic()
        while missing := self._not_ready():
            if self._failure is not None:
                raise EngineFailedError(self._failure)
            if time.monotonic() - started > deadline:
                raise EngineFailedError(f"after {deadline:.0f} s these ranks are not ready: {_numbers(missing)}")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.05)
        self.health.restart()
        self._serving = True
        self._tasks.append(asyncio.create_task(self._watch(), name="watch the ranks"))
        return [self.ready[rank] for rank in range(self._config.world_size)]

    def _not_ready(self) -> list[int]:
        # A Ready may overtake the connection in the other direction: both are needed before anything can be sent.
        ranks = range(self._config.world_size)
        return [rank for rank in ranks if rank not in self.ready or not self._sockets.connected(rank)]

    def fail(self, reason: str) -> None:
        """The engine is lost, for good: everyone in flight and everyone to come gets `reason`. Any thread may call."""
        if self._loop is None or self._loop.is_closed():
            self._fail(reason)
        else:
            self._loop.call_soon_threadsafe(self._fail, reason)

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
            logger.error("the engine has failed: %s", reason)
        self._failed.set()
        self._changed.set()
        self.drop_all(reason)

    async def wait_failed(self) -> str:
        """Returns the reason once the engine is lost; waits for ever while it is well."""
        await self._failed.wait()
        return self._failure or "unknown"

    def refuse_new(self, reason: str) -> None:
        """No new sequences from now on; those in flight go on."""
        self._closing = reason

    def shutdown_ranks(self) -> None:
        """Ask every rank to end; no answer is awaited."""
        for rank in range(self._config.world_size):
            with contextlib.suppress(RankGoneError):
                self._sockets.send((rank,), Control(control_id=SHUTDOWN_ID, command="shutdown"))

    async def close(self) -> None:
        self.drop_all("the server has ended")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sockets.close(flush_seconds=0.5)

    # Health and load

    def problem(self) -> str | None:
        """Why the engine cannot serve now, or None."""
        if self._failure is not None:
            return self._failure
        if not self._serving:
            return "the ranks are not ready yet"
        return self.health.problem() or self._closing

    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def loads(self) -> list[LoadReport]:
        """The last report of each DP rank; zeros for one that has not worked yet."""
        reports = self._balancer.last_reports()
        leaders = [self.ready.get(dp_rank * self._config.attn_tp_size) for dp_rank in range(self._config.dp_size)]
        capacities = [0 if leader is None else leader.max_total_num_tokens for leader in leaders]
        return [report or no_load(dp_rank, capacities[dp_rank]) for dp_rank, report in enumerate(reports)]

    def room(self) -> int | None:
        """How many more sequences the server takes before its queue is over the limit; None: any number."""
        limit = self._config.max_queued_requests
        return None if limit is None else self._balancer.room(self._config.max_running_requests, limit)

    # Sequences

    def submit(self, request: GenerateRequest, name: str, arrivals: Arrivals, pinned: int | None = None) -> tuple[int, int]:
        """Send `request` (its rid is replaced) to a DP rank; what comes back goes to `arrivals`. Returns rid and DP
        rank.

        Raises EngineFailedError when the engine cannot serve, ValueError when `pinned` is no DP rank.
        """
        problem = self.problem()
        if problem is not None:
            raise EngineFailedError(problem)
        dp_rank = self._balancer.choose(pinned)
        rid = next(self._rids)
        self._in_flight[rid] = _InFlight(name=name, dp_rank=dp_rank, arrivals=arrivals)
        self._balancer.sent(dp_rank, rid, len(request.input_ids))
        group = self._group(dp_rank)
        self._send(group, msgspec.structs.replace(request, rid=rid))
        others = [rank for rank in range(self._config.world_size) if rank not in group]
        self._send(others, Wake())
        return rid, dp_rank

    def abort(self, rid: int, *, finish: bool = False) -> None:
        """Forget the sequence and tell its ranks; nothing more arrives. Harmless when it has already ended."""
        flight = self._forget(rid)
        if flight is not None and self._failure is None:
            self._send(self._group(flight.dp_rank), AbortRequest(rid=rid, finish=finish))

    def abort_named(self, name: str | None) -> int:
        """Ask the ranks to abort all sequences of this name (None: of every name), a batch's by the batch's name too; their
        consumers see it end by "abort".
        """
        chosen = [(rid, flight) for rid, flight in self._in_flight.items() if name is None or _is_called(flight.name, name)]
        for rid, flight in chosen:
            self._send(self._group(flight.dp_rank), AbortRequest(rid=rid))
        return len(chosen)

    async def control(
        self, command: Command, timeout: float = 30.0, *, profile: ProfileOptions | None = None
    ) -> list[ControlReply]:
        """Send a command to every rank; the DP leaders' answers. Raises EngineFailedError when one does not answer.

        `timeout` in seconds; `profile`: of start_profile.
        """
        problem = self.problem()
        if problem is not None:
            raise EngineFailedError(problem)
        every = range(self._config.world_size)
        try:
            return await self._control.call(command, lambda message: self._send(every, message), timeout, profile)
        except TimeoutError as error:
            raise EngineFailedError(str(error)) from None

    # Inside

    def _group(self, dp_rank: int) -> range:
        size = self._config.attn_tp_size
        return range(dp_rank * size, (dp_rank + 1) * size)

    def _send(self, ranks: range | list[int], message: GenerateRequest | AbortRequest | Control | Wake) -> None:
        try:
            self._sockets.send(ranks, message)
        except RankGoneError as error:
            # Some ranks of the group may have it and others not: there is no way back from that.
            self._fail(str(error))

    def _forget(self, rid: int) -> _InFlight | None:
        flight = self._in_flight.pop(rid, None)
        if flight is not None:
            self._balancer.done(flight.dp_rank, rid)
        return flight

    def drop_all(self, reason: str) -> None:
        """Every sequence in flight ends with `reason` as its failure."""
        for rid in list(self._in_flight):
            flight = self._in_flight.get(rid)
            if flight is not None:
                flight.arrivals.put_nowait((rid, EngineFailedError(reason)))
                self.abort(rid)

    async def _receive(self) -> None:
        while True:
            try:
                message = await self._sockets.receive()
            except msgspec.MsgspecError as error:
                self._fail(f"a rank sent a message that cannot be read: {error}")
                return
            self._take(message)

    def _take(self, message: FromRank) -> None:
        match message:
            case StepOutputs():
                self._take_outputs(message)
            case Heartbeat():
                self.health.observe(message)
            case Progress() | Ready():
                if isinstance(message, Ready):
                    self.ready[message.rank] = message
                self._on_progress(message)
                self._changed.set()
            case ControlReply():
                self._control.take(message)
            case RankError():
                logger.error("%s\n%s", message.message, message.traceback)
                asyncio.get_running_loop().call_later(BLAME_SECONDS, self._fail, message.message)

    def _take_outputs(self, step: StepOutputs) -> None:
        self.last_output_at = time.monotonic()
        for output in every_output(step.outputs, step.rids, step.tokens):
            flight = self._in_flight.get(output.rid)
            if flight is None:
                continue
            flight.arrivals.put_nowait((output.rid, output))
            if output.finish_reason is not None:
                self._forget(output.rid)
        self._balancer.report(step.load)

    async def _watch(self) -> None:
        """Drop what is in flight when a rank turns red, so that no client hangs on it."""
        while True:
            slept_from = time.monotonic()
            await asyncio.sleep(WATCH_INTERVAL)
            if time.monotonic() - slept_from > 4 * WATCH_INTERVAL:
                continue  # This process itself was late: heartbeats may still lie unread in the socket.
            problem = self.health.problem()
            if problem is not None and self._in_flight:
                logger.error("dropping %d sequences: %s", len(self._in_flight), problem)
                self.drop_all(problem)


def _is_called(name: str, asked: str) -> bool:
    """A batch that is called "a" has the sequences "a_0", "a_1" and so on."""
    batch, _, index = name.rpartition("_")
    return name == asked or (batch == asked and index.isdecimal())


def _numbers(ranks: list[int] | set[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
