"""A node of a server of several: how it meets the others, and what a node other than 0 does for its life.

Node 0 serves HTTP (`launch/server.py`). The other nodes run their ranks, watch them and the other nodes, and serve a
health endpoint at their own --host and --port (two nodes on one machine need different ports). When any rank or node
dies, every node names it and exits non-zero. Ctrl-C on node 0 ends all nodes in good order; on another node it ends the
server.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from moesaic.launch.config import ServerConfig
from moesaic.launch.endpoints import Endpoints
from moesaic.launch.engine.rank_spec import RankSpec
from moesaic.launch.errors import RankFailedError
from moesaic.launch.node_health import NodeHealthServer, NodeState
from moesaic.launch.rendezvous import Meeting, NodeWatch, meet
from moesaic.launch.startup import Plan, shared_settings
from moesaic.launch.supervision import SUPERVISION_SECONDS, Supervisor
from moesaic.launch.topology import Topology
from moesaic.launch.workers import WorkerGroup

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

GRACE_SECONDS = 3.0


def make_meeting(config: ServerConfig, topology: Topology) -> Meeting:
    """Who meets where."""
    assert config.dist_init_addr is not None
    return Meeting(
        address=config.dist_init_addr,
        node_rank=config.node_rank,
        names=tuple(node_name(topology, node) for node in range(config.nnodes)),
        timeout=config.dist_timeout,
    )


def node_name(topology: Topology, node: int) -> str:
    """Such as "node 1 (ranks 8..15)"."""
    ranks = topology.ranks_of_node(node)
    return f"node {node} (ranks {ranks.start}..{ranks.stop - 1})" if len(ranks) > 1 else f"node {node} (rank {ranks[0]})"


@contextlib.contextmanager
def watched_nodes(plan: Plan) -> Iterator[NodeWatch | None]:
    """Meet the other nodes and watch them while the context lasts; None for a server of one node."""
    if plan.config.nnodes == 1:
        yield None
        return
    meeting = make_meeting(plan.config, plan.resolution.topology)
    store: TCPStore = meet(meeting, shared_settings(plan))
    watch = NodeWatch(store, meeting)
    try:
        yield watch
    except Exception as error:
        watch.report(f"{meeting.names[meeting.node_rank]}: {error}")
        raise
    finally:
        watch.close()


def rank_specs(plan: Plan, endpoints: Endpoints) -> list[RankSpec]:
    """What this node's ranks are told."""
    resolution, topology = plan.resolution, plan.resolution.topology
    return [
        RankSpec(
            config=resolution.config,
            topology=topology,
            place=topology.place(rank),
            dist_init_method=endpoints.dist_init_method,
            to_rank_endpoint=endpoints.to_rank[rank],
            from_rank_endpoint=endpoints.from_rank,
            slots=plan.experts.slots,
            rebalance=plan.experts.rebalance,
            thresholds=plan.overlap.thresholds,
            role=plan.role,
        )
        for rank in topology.ranks_of_node(plan.config.node_rank)
    ]


def run_other_node(plan: Plan, watch: NodeWatch, workers: WorkerGroup, sock: socket.socket) -> int:
    """Everything a node other than 0 does once the nodes have met.

    Returns 0 for a clean end, raises RankFailedError else.
    """
    supervisor = Supervisor(workers, watch)
    interrupted = threading.Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if interrupted.is_set():
            workers.kill()
        interrupted.set()

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with NodeHealthServer(sock, lambda: _state(plan, watch, workers)):
            workers.start()
            return _watch_until_end(plan, watch, supervisor, interrupted)
    finally:
        workers.stop(GRACE_SECONDS if watch.stopped else 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch_until_end(plan: Plan, watch: NodeWatch, supervisor: Supervisor, interrupted: threading.Event) -> int:
    while not watch.stopped:
        if interrupted.wait(SUPERVISION_SECONDS):
            watch.report(f"{node_name(plan.resolution.topology, plan.config.node_rank)} was stopped by hand")
            return 0
        culprit = supervisor.culprit()
        # Ranks that node 0 has told to end may be gone a moment before the news that this is the end.
        if culprit is not None and not watch.stopped:
            raise RankFailedError(culprit)
    return 0


def _state(plan: Plan, watch: NodeWatch, workers: WorkerGroup) -> NodeState:
    exits = {one.rank: str(one) for one in workers.exits()}
    problem = watch.problem()
    ranks = {str(rank): exits.get(rank, "running") for rank in workers.pids}
    return NodeState(
        healthy=not exits and problem is None and bool(ranks),
        details={"node_rank": plan.config.node_rank, "ranks": ranks, "problem": problem},
    )
