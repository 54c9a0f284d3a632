"""Carries out control commands: in the same step on every rank, with no forward under way, so they may use collectives.

Knows no sockets. What a rank refuses is answered by the DP leaders, and the engine goes on.
"""

from __future__ import annotations

import logging

from moesaic.launch.engine.failure_exchange import FailureExchange
from moesaic.launch.engine.messages import Control, ControlReply, ProfileOptions
from moesaic.launch.engine.profiling import ProfileRefused, Profiling
from moesaic.launch.engine.rebalancing import Rebalancing
from moesaic.launch.engine.recording import LoadRecording
from moesaic.launch.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Controls:
    """The commands of one rank. `refusals`: over a group that the calling thread alone uses. `stop`: the rank was told to end."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        recording: LoadRecording,
        rebalancing: Rebalancing | None,
        profiling: Profiling,
        refusals: FailureExchange,
    ) -> None:
        self._scheduler = scheduler
        self._recording = recording
        self._rebalancing = rebalancing
        self._profiling = profiling
        self._refusals = refusals
        self.stop = False

    def carry_out(self, command: Control) -> ControlReply:
        """Collective: in the same step on every rank."""
        message, ok = "", True
        files: tuple[str, ...] = ()
        if command.command == "rebalance":
            message, ok = self._start_rebalance()
        elif command.command == "flush_cache":
            message = f"{self._scheduler.cache.flush()} pages freed"
        elif command.command == "shutdown":
            self.stop = True
        elif command.command == "start_profile":
            message, ok, files = self._start_profile(command)
        elif command.command == "stop_profile":
            message, ok, files = self._stop_profile()
        else:
            message = self._recording.carry_out(command.command)
        return ControlReply(control_id=command.control_id, dp_rank=self._recording.dp_rank, ok=ok, message=message, files=files)

    def _start_rebalance(self) -> tuple[str, bool]:
        """(what to tell the client, whether a cycle begins)."""
        if self._rebalancing is None:
            return "experts do not move here: start the server with --enable-eplb", False
        if self._rebalancing.manager.busy:
            return "a rebalance is under way", False
        self._rebalancing.manager.start_now()
        return "rebalancing", True

    def _start_profile(self, command: Control) -> tuple[str, bool, tuple[str, ...]]:
        """(what to tell the client, whether all ranks record from the next step on, their files)."""
        options = command.profile or ProfileOptions()
        refusal = ""
        try:
            self._profiling.prepare(options, f"profile-{command.control_id}")
        except ProfileRefused as error:
            refusal = str(error)
        told = self._told(refusal)
        if not told:
            return "recording", True, self._profiling.files()
        if not refusal:
            self._profiling.cancel()
        return told, False, ()

    def _stop_profile(self) -> tuple[str, bool, tuple[str, ...]]:
        refusal = ""
        files = self._profiling.files() if self._profiling.running else ()
        try:
            self._profiling.stop()
        except ProfileRefused as error:
            refusal = str(error)
        told = self._told(refusal)
        return told or "written", not told, () if told else files

    def _told(self, refusal: str) -> str:
        """This rank's refusal, or that another one refuses; "" when none does. Collective."""
        if refusal:
            logger.warning("%s", refusal)
        refused = self._refusals.post(int(bool(refusal))).failed()
        return refusal if refusal or refused is None else f"rank {refused[0]} refused; its log says why"
