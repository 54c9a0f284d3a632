"""Which parallel layouts are legal in themselves: conflicts among the flags, whatever the model.

Knows the flags only. What the model's numbers add is in `launch/model_rules.py`; rules that need resolved sizes (the
low-latency cap) are in `launch/dispatch_limits.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import Conflict, divisors, nearest


def layout_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    """Conflicts among the flags alone; needs no model, so it is asked first."""
    yield from _dp_conflicts(config)
    yield from _ep_conflicts(config)
    yield from _dense_conflicts(config)
    yield from _node_conflicts(config)


def _dp_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    tp, dp = config.tp_size, config.dp_size
    if tp % dp:
        yield Conflict(
            flags=f"--tp-size {tp} --dp-size {dp}",
            reason="tp counts all ranks, and dp must divide it",
            remedy=nearest("--dp-size", divisors(tp), dp),
        )
    if dp > 1 and not config.enable_dp_attention:
        yield Conflict(
            flags=f"--dp-size {dp} without --enable-dp-attention",
            reason="data parallelism inside one server is DP attention",
            remedy="add --enable-dp-attention, or --dp-size 1",
        )
    if config.enable_dp_lm_head and not (config.enable_dp_attention and dp > 1):
        without = "" if config.enable_dp_attention else " without --enable-dp-attention"
        yield Conflict(
            flags=f"--enable-dp-lm-head with --dp-size {dp}{without}",
            reason="a head per DP rank needs DP attention",
            remedy="add --enable-dp-attention and --dp-size 2 or more, or drop --enable-dp-lm-head",
        )


def _ep_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    tp, ep, backend = config.tp_size, config.ep_size, config.moe_a2a_backend
    if backend == "none" and tp % ep:
        yield Conflict(
            flags=f"--tp-size {tp} --ep-size {ep}",
            reason="without an all-to-all backend, ep must divide tp",
            remedy=nearest("--ep-size", divisors(tp), ep),
        )
    if backend != "none" and ep not in (1, tp):
        yield Conflict(
            flags=f"--tp-size {tp} --ep-size {ep} --moe-a2a-backend {backend}",
            reason="with an all-to-all backend every rank is an expert-parallel rank",
            remedy=f"--ep-size {tp} (or leave it out), or --moe-a2a-backend none",
        )


def _dense_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    dense_tp, tp, dp = config.moe_dense_tp_size, config.tp_size, config.dp_size
    if dense_tp is None or tp % dp or dense_tp in (1, tp // dp):
        return
    legal = "--moe-dense-tp-size 1" if tp == dp else f"--moe-dense-tp-size 1 or {tp // dp}"
    yield Conflict(
        flags=f"--moe-dense-tp-size {dense_tp} with --tp-size {tp} --dp-size {dp}",
        reason=f"a dense layer is either whole on each rank or shared like attention (TP {tp // dp})",
        remedy=legal,
    )


def _node_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    tp, nnodes = config.tp_size, config.nnodes
    if tp % nnodes:
        yield Conflict(
            flags=f"--tp-size {tp} --nnodes {nnodes}",
            reason="every node runs equally many ranks",
            remedy=nearest("--nnodes", divisors(tp), nnodes),
        )
    if nnodes > 1 and config.dist_init_addr is None:
        yield Conflict(
            flags=f"--nnodes {nnodes} without --dist-init-addr",
            reason="the nodes need one place to meet",
            remedy="add --dist-init-addr HOST:PORT, an address of node 0, the same on every node",
        )
    if config.node_rank >= nnodes:
        yield Conflict(
            flags=f"--node-rank {config.node_rank} --nnodes {nnodes}",
            reason="nodes are counted from 0",
            remedy=f"--node-rank 0..{nnodes - 1}, or --nnodes {config.node_rank + 1}",
        )
