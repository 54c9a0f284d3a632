"""Server-wide commands to the ranks and the collecting of their answers: one from each DP leader.

Knows neither sockets nor what the commands do.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Literal

from moesaic.launch.engine.messages import Control, ControlReply, ProfileOptions

Command = Literal["flush_cache", "start_record", "stop_record", "dump_record", "start_profile", "stop_profile", "rebalance"]


class _Call:
    """One command under way."""

    def __init__(self) -> None:
        self.replies: dict[int, ControlReply] = {}
        self.complete = asyncio.Event()


class ControlCalls:
    """Commands under way. `take` is called with every answer that arrives."""

    def __init__(self, dp_size: int) -> None:
        self._dp_size = dp_size
        self._ids = itertools.count(1)
        self._calls: dict[int, _Call] = {}

    async def call(
        self, command: Command, send: Callable[[Control], None], timeout: float, profile: ProfileOptions | None = None
    ) -> list[ControlReply]:
        """Send the command; the answers by DP rank. TimeoutError names the DP ranks that are silent."""
        control_id, call = next(self._ids), _Call()
        self._calls[control_id] = call
        try:
            send(Control(control_id=control_id, command=command, profile=profile))
            await asyncio.wait_for(call.complete.wait(), timeout)
        except TimeoutError:
            silent = [str(dp_rank) for dp_rank in range(self._dp_size) if dp_rank not in call.replies]
            raise TimeoutError(f"no answer to {command} from DP rank {', '.join(silent)}") from None
        finally:
            del self._calls[control_id]
        return [call.replies[dp_rank] for dp_rank in sorted(call.replies)]

    def take(self, reply: ControlReply) -> None:
        call = self._calls.get(reply.control_id)
        if call is None:
            return
        call.replies[reply.dp_rank] = reply
        if len(call.replies) >= self._dp_size:
            call.complete.set()
