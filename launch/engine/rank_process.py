"""The process of one rank: starts up (rank_startup.py), then runs the lockstep loop until told to stop.

Talks to the HTTP process over ZMQ (messages.py). Anything that goes wrong is reported as a RankError that names rank and operation
before the process exits with status 1; the launcher does the rest.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback

import zmq

from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.core import RankEngine, RequestMessage, StepResult
from moesaic.launch.engine.inbox import Inbox
from moesaic.launch.engine.messages import FromRank, Heartbeat, LoadReport, RankError, StepOutputs, encoder
from moesaic.launch.engine.rank_spec import RankSpec
from moesaic.launch.engine.rank_startup import AttachRooms, RankStartup
from moesaic.launch.engine.step_log import StepLog

HEARTBEAT_S = 1.0
IDLE_POLL_S = 1.0
ROOM_POLL_S = 0.001
"""Between two steps that run nothing, while only transfers are under way."""
LINGER_MS = 2000


def run_rank(spec: RankSpec, attach: AttachRooms | None = None) -> None:
    """Entry point of a rank process; returns after a clean stop, exits with status 1 after an error.

    `attach`: makes the rooms of an instance with a role.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = f"%(asctime)s %(levelname)s rank {spec.place.rank} %(name)s: %(message)s"
    logging.basicConfig(level=spec.config.log_level.upper(), format=line)
    context = zmq.Context()
    activity = Activity(spec.place.rank)
    outbox = Outbox(spec.from_rank_endpoint)
    _start_heartbeat(spec, activity)
    try:
        RankProcess(spec, context, outbox, activity).run(attach)
    except Exception as error:
        message = f"{activity.describe()}: {error}"
        print(message, file=sys.stderr, flush=True)
        outbox.send(RankError(rank=spec.place.rank, message=message, traceback=traceback.format_exc()))
        outbox.close()
        os._exit(1)
    os._exit(0)  # nobody reads what might still be queued: the HTTP process has closed its side


class Outbox:
    """A PUSH socket for messages of this rank. One per thread; each has its own context, so that `close` can wait for it alone."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)

    def send(self, message: FromRank) -> None:
        self._socket.send(encoder.encode(message))

    def close(self) -> None:
        """Wait until what is queued has been delivered, at most LINGER_MS."""
        self._socket.close(LINGER_MS)
        self._context.term()


def _start_heartbeat(spec: RankSpec, activity: Activity) -> None:
    def beat() -> None:
        outbox = Outbox(spec.from_rank_endpoint)
        while True:
            doing = activity.current()
            status = activity.rebalance_status
            outbox.send(
                Heartbeat(
                    rank=spec.place.rank,
                    step=doing.step,
                    operation=doing.operation,
                    seconds=doing.seconds,
                    rebalance=None if status is None else status(),
                )
            )
            time.sleep(HEARTBEAT_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


class RankProcess:
    """Start-up and loop of one rank."""

    def __init__(self, spec: RankSpec, context: zmq.Context[zmq.Socket[bytes]], outbox: Outbox, activity: Activity) -> None:
        self._spec = spec
        self._outbox = outbox
        self._activity = activity
        self._last_load: LoadReport | None = None
        self._log = StepLog(spec.config.decode_log_interval)
        socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(spec.to_rank_endpoint)
        self._inbox = Inbox(socket)

    def run(self, attach: AttachRooms | None = None) -> None:
        """Start up, say so, and step until a shutdown command."""
        engine = RankStartup(self._spec, self._activity, self._outbox.send, attach).run()
        self._activity.enter("idle")
        announced: list[RequestMessage] = []
        while True:
            self._inbox.receive()
            for command in self._inbox.controls():
                engine.control(command)
            announced = self._announce(engine)
            self._advance_rooms(engine)
            result = engine.step(num_messages=len(announced))
            self._apply_announced(engine, announced, result)
            self._send(engine, result)
            if result.step.stop:
                return
            if result.step.quiet:
                self._activity.enter("idle")
                self._inbox.wait(IDLE_POLL_S)
            elif result.step.idle and self._spec.role is not None:
                self._inbox.wait(ROOM_POLL_S)

    def _announce(self, engine: RankEngine) -> list[RequestMessage]:
        """Requests for the next step: a DP group of one rank takes them at once, a leader tells its group first."""
        place = self._spec.place
        if self._spec.topology.attn_tp_size == 1:
            for message in self._inbox.requests():
                engine.apply(message)
            return []
        return self._inbox.requests() if place.is_leader else []

    def _advance_rooms(self, engine: RankEngine) -> None:
        """What has come of transfers is not kept back until the step has ended."""
        outputs = engine.advance_rooms()
        if outputs:
            self._last_load = engine.load(self._spec.place.dp_rank)
            self._outbox.send(StepOutputs(dp_rank=self._spec.place.dp_rank, outputs=outputs, load=self._last_load))

    def _apply_announced(self, engine: RankEngine, announced: list[RequestMessage], result: StepResult) -> None:
        place = self._spec.place
        if self._spec.topology.attn_tp_size > 1 and not place.is_leader:
            count = result.step.num_messages[place.dp_rank]
            announced = self._inbox.take(count, self._spec.config.dist_timeout) if count else []
        for message in announced:
            engine.apply(message)

    def _send(self, engine: RankEngine, result: StepResult) -> None:
        if not self._spec.place.is_leader:
            return
        dp_rank = self._spec.place.dp_rank
        load = engine.load(dp_rank)
        self._log.step(result.plan, load)
        # Steps that only wait for transfers are many: they have news when the load is another one. It may be in a quiet step too,
        # when the last room has ended before it.
        has_role = self._spec.role is not None
        waits = result.step.idle if has_role else result.step.quiet
        if result.outputs or result.rids or not waits or (has_role and load != self._last_load):
            outputs = StepOutputs(dp_rank=dp_rank, outputs=result.outputs, rids=result.rids, tokens=result.tokens, load=load)
            self._outbox.send(outputs)
            self._last_load = load
        for reply in result.replies:
            self._outbox.send(reply)
