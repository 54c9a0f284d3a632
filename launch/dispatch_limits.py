"""The low-latency layout's cap: how many tokens one rank may bring into a step, and what to do when the flags allow
more.

The low-latency layout has a fixed receive buffer, `[local_experts, max_tokens_per_rank * ranks, hidden]`, so a step
that takes it may not bring more than `--deepep-max-dispatch-tokens-per-rank` tokens from any rank. Knows no backend and
no step. Mode "auto" needs no rule here: it takes the normal layout for a step that would not fit. With an all-to-all
backend the ranks of one attention-TP group share their DP rank's tokens; with backend `none` each brings all.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.launch.config import ResolvedConfig
from moesaic.launch.conflicts import Conflict
from moesaic.launch.topology import Topology


def tokens_cap_per_dp(max_tokens_per_rank: int, backend: str, topology: Topology) -> int:
    """The most tokens that one DP rank may bring into a low-latency step."""
    return max_tokens_per_rank * (1 if backend == "none" else topology.attn_tp_size)


def dispatch_conflicts(config: ResolvedConfig, topology: Topology) -> Iterator[Conflict]:
    """Steps that would take the low-latency layout and not fit it."""
    cap = tokens_cap_per_dp(config.max_dispatch_tokens_per_rank, config.moe_a2a_backend, topology)
    running, chunk = config.max_running_requests_per_dp, config.chunked_prefill_tokens_per_dp
    # A request that prefills is one of the running ones, and does not decode in that step.
    most = running - 1 + chunk
    cap_flag = f"--deepep-max-dispatch-tokens-per-rank {config.max_dispatch_tokens_per_rank}"
    if config.dispatch_mode == "low_latency" and most > cap:
        room = max(cap - running + 1, 0) * topology.dp_size
        wanted = _tokens_per_rank(most, config, topology)
        smaller = f"lower --chunked-prefill-size to {room}, or " if room else ""
        yield Conflict(
            flags=f"--deepep-mode low_latency {cap_flag}",
            reason=(
                f"a step may hold {running} running requests (--max-running-requests, per DP rank) and prefill {chunk} "
                f"tokens (--chunked-prefill-size, per DP rank), and the low-latency layout takes {cap} in all"
            ),
            remedy=(
                "two ways out: --deepep-mode auto, which takes the normal layout whenever a rank prefills; "
                f"or make the steps fit: {smaller}raise --deepep-max-dispatch-tokens-per-rank to {wanted}"
            ),
        )


def _tokens_per_rank(tokens_per_dp: int, config: ResolvedConfig, topology: Topology) -> int:
    """How many of a DP rank's tokens one of its ranks brings, at most."""
    return tokens_per_dp if config.moe_a2a_backend == "none" else -(-tokens_per_dp // topology.attn_tp_size)
