"""The low-latency layout's cap: how many tokens one rank may bring into a step, and what to do when the flags allow
more.

The low-latency layout has a fixed receive buffer, `[local_experts, max_tokens_per_rank * ranks, hidden]`, so a step
that takes it may not bring more than `--deepep-max-dispatch-tokens-per-rank` tokens from any rank. Knows no backend and
no step. Mode "auto" needs no rule here: it takes the normal layout for a step that would not fit. With an all-to-all
backend the ranks of one attention-TP group share their DP rank's tokens; with backend `none` each brings all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.launch.config import DispatchMode, ServerConfig
from moesaic.launch.conflicts import Conflict
from moesaic.launch.topology import Topology


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """The most that one DP rank brings into a step: requests that decode, one token each, and tokens of prompts."""

    running_requests: int
    prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        # A request that prefills is one of the running ones, and does not decode in that step.
        return self.running_requests - 1 + self.prompt_tokens


def tokens_cap_per_dp(max_tokens_per_rank: int, backend: str, topology: Topology) -> int:
    """The most tokens that one DP rank may bring into a low-latency step."""
    return max_tokens_per_rank * (1 if backend == "none" else topology.attn_tp_size)


def dispatch_conflicts(config: ServerConfig, mode: DispatchMode, sizes: StepSizes, topology: Topology) -> Iterator[Conflict]:
    """Steps that would take the low-latency layout and not fit it."""
    max_tokens = config.deepep_max_dispatch_tokens_per_rank
    cap = tokens_cap_per_dp(max_tokens, config.moe_a2a_backend, topology)
    if mode == "low_latency" and sizes.num_tokens > cap:
        room = max(cap - sizes.running_requests + 1, 0) * topology.dp_size
        wanted = _tokens_per_rank(sizes.num_tokens, config, topology)
        smaller = f"lower --chunked-prefill-size to {room}, or " if room else ""
        yield Conflict(
            flags=f"--deepep-mode low_latency --deepep-max-dispatch-tokens-per-rank {max_tokens}",
            reason=(
                f"a step may hold {sizes.running_requests} running requests (--max-running-requests, per DP rank) and prefill "
                f"{sizes.prompt_tokens} tokens (--chunked-prefill-size, per DP rank), and the low-latency layout takes {cap} in all"
            ),
            remedy=(
                "two ways out: --deepep-mode auto, which takes the normal layout whenever a rank prefills; "
                f"or make the steps fit: {smaller}raise --deepep-max-dispatch-tokens-per-rank to {wanted}"
            ),
        )


def _tokens_per_rank(tokens_per_dp: int, config: ServerConfig, topology: Topology) -> int:
    """How many of a DP rank's tokens one of its ranks brings, at most."""
    return tokens_per_dp if config.moe_a2a_backend == "none" else -(-tokens_per_dp // topology.attn_tp_size)
