"""What a decode rank knows of prefill instances: their layouts and its connections to their ranks, made when a room needs them.

Runs in the transfer thread. An instance that can't be reached is tried again for a moment, one whose ranks have not all registered
until the room's deadline; a lost connection makes the instance's layout be asked for anew, so a restarted one is found again. Knows
no pages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from moesaic.launch.disaggregation.bootstrap import PrefillTopology, RankAddress
from moesaic.launch.disaggregation.bootstrap_client import BootstrapError, BootstrapUnreachableError, fetch_topology
from moesaic.launch.disaggregation.layout import prefill_dp_rank, source_ranks
from moesaic.launch.disaggregation.link import Link, LinkError
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.protocol import (
    PROTOCOL_VERSION,
    ControlMessage,
    Hello,
    KVLayout,
    LayoutMismatchError,
    RoomError,
    TransferError,
    Welcome,
    check_same_kv,
    to_decode_decoder,
)
from moesaic.launch.disaggregation.transfer import Backend

RETRY_S = 0.1
CONNECT_S = 3.0
UNREACHABLE_S = 2.0
"""Whoever sent the request has just seen the instance alive: one that can't be reached for so long is gone."""


@dataclass(eq=False)
class Source:
    """A prefill rank that this decode rank is connected to. `peer` is its name towards the backend."""

    link: Link
    peer: str
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodeRank:
    """Who this decode rank is; `instance` is unique per start of a server."""

    instance: str
    rank: int
    layout: KVLayout

    @property
    def attn_tp_rank(self) -> int:
        return self.rank % self.layout.attn_tp_size

    def __str__(self) -> str:
        return f"decode instance {self.instance} rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class Route:
    """Whom a room is fetched from: its sources, and how many decode ranks fetch from each of them (all the same number)."""

    sources: tuple[Source, ...]
    num_receivers: tuple[int, ...]


class PrefillDirectory:
    """`on_message(source, message)` and `on_lost(source, why)` are called for every connection. All in the loop's thread."""

    def __init__(
        self,
        rank: DecodeRank,
        backend: Backend,
        thread: LoopThread,
        on_message: Callable[[Source, ControlMessage], None],
        on_lost: Callable[[Source, str], None],
    ) -> None:
        self._rank = rank
        self._backend = backend
        self._thread = thread
        self._on_message = on_message
        self._on_lost = on_lost
        self._topologies: dict[str, PrefillTopology] = {}
        self._sources: dict[tuple[str, int, int], asyncio.Task[Source]] = {}
        self._peer_numbers = count()
        self.problems: dict[str, str] = {}
        """By bootstrap address: why its instance could not be reached when it was last tried."""

    async def route(self, address: str, room: int, dp_rank: int | None, seconds: float) -> Route:
        """The connected sources of a room. Raises TransferError when the instance refuses, is gone, or not ready in `seconds`."""
        began = time.monotonic()
        while True:
            try:
                route = await self._try_route(address, room, dp_rank)
                if not any(source.lost for source in route.sources):
                    return route
            except (LayoutMismatchError, RoomError) as error:
                raise TransferError("refused", str(error)) from error
            except (BootstrapError, LinkError, OSError) as error:
                self.problems[address] = str(error)
                self._topologies.pop(address, None)
                starting = isinstance(error, BootstrapError) and not isinstance(error, BootstrapUnreachableError)
                patience = seconds if starting else min(seconds, UNREACHABLE_S)
                if time.monotonic() + RETRY_S > began + patience:
                    raise TransferError("lost", f"{error}; tried for {patience:g} s") from error
            await asyncio.sleep(RETRY_S)

    async def _try_route(self, address: str, room: int, dp_rank: int | None) -> Route:
        topology = await self._topology(address)
        layout = self._rank.layout
        group = prefill_dp_rank(room, topology.dp_size, dp_rank)
        prefill_size, decode_size = topology.attn_tp_size, layout.attn_tp_size
        ranks = source_ranks(self._rank.attn_tp_rank, decode_size, prefill_size)
        sources = await asyncio.gather(*(self._source(address, topology, group, rank) for rank in ranks))
        receivers = [sum(rank in source_ranks(other, decode_size, prefill_size) for other in range(decode_size)) for rank in ranks]
        return Route(sources=tuple(sources), num_receivers=tuple(receivers))

    async def _topology(self, address: str) -> PrefillTopology:
        known = self._topologies.get(address)
        if known is None:
            known = await asyncio.get_running_loop().run_in_executor(None, fetch_topology, address)
            check_same_kv(known.layout, self._rank.layout)
            self._topologies[address] = known
        return known

    async def _source(self, address: str, topology: PrefillTopology, dp_rank: int, tp_rank: int) -> Source:
        """The connection to a prefill rank; rooms that need it at the same time share the attempt."""
        key = (topology.instance, dp_rank, tp_rank)
        attempt = self._sources.get(key)
        if attempt is None:
            rank_address = topology.addresses[dp_rank][tp_rank]
            attempt = asyncio.get_running_loop().create_task(self._connect(address, topology.instance, rank_address, key))
            attempt.add_done_callback(_retrieve)
            self._sources[key] = attempt
        try:
            return await asyncio.shield(attempt)
        except (LayoutMismatchError, LinkError, OSError):
            if self._sources.get(key) is attempt:
                del self._sources[key]
            raise

    async def _connect(self, address: str, instance: str, rank_address: RankAddress, key: tuple[str, int, int]) -> Source:
        name = f"prefill instance {instance} at {rank_address.rank_ip}:{rank_address.rank_port}"
        try:
            async with asyncio.timeout(CONNECT_S):
                streams = await asyncio.open_connection(rank_address.rank_ip, rank_address.rank_port)
        except OSError as error:  # TimeoutError is one
            raise LinkError(f"{name} can't be reached: {error or 'no answer'}") from error
        link = Link(*streams, to_decode_decoder, name)
        try:
            welcome = await self._introduce(link)
            if welcome.instance != instance:
                raise LinkError(f"{name} has made way for instance {welcome.instance}")
            link.peer = f"prefill instance {welcome.instance} rank {welcome.rank}"
            source = Source(link, f"{welcome.instance}/{welcome.rank}/{next(self._peer_numbers)}")
            self._backend.connect(source.peer, welcome.memory)
        except ValueError as error:
            await link.close()
            raise LayoutMismatchError(str(error)) from error
        except LinkError:
            await link.close()
            raise
        self._thread.spawn(self._serve(source, address, key))
        return source

    async def _introduce(self, link: Link) -> Welcome:
        rank = self._rank
        link.send(Hello(version=PROTOCOL_VERSION, instance=rank.instance, rank=rank.rank, layout=rank.layout))
        answer = await link.receive()
        if isinstance(answer, Welcome):
            return answer
        raise LayoutMismatchError(getattr(answer, "reason", f"{link.peer} did not answer Hello with Welcome"))

    async def _serve(self, source: Source, address: str, key: tuple[str, int, int]) -> None:
        try:
            why = await source.link.serve(lambda message: self._on_message(source, message))
            self._sources.pop(key, None)
            self._topologies.pop(address, None)
            self.problems[address] = why
            source.lost = True
            self._backend.disconnect(source.peer)
            self._on_lost(source, why)
        finally:
            await source.link.close()


def _retrieve(attempt: asyncio.Task[Source]) -> None:
    """A failed attempt whose room was given up meanwhile is no bug: asyncio is not to report it."""
    if not attempt.cancelled():
        attempt.exception()
