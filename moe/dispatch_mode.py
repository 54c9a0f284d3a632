"""Which of DeepEP's two modes a step's dispatch runs in: the one rule, from what every rank knows.

Knows flags and counts, no tensors: the launcher, which plans and reports modes, need not import torch for it.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal


class DispatchMode(Enum):
    """normal: many tokens, the CPU waits for counts. low_latency: few tokens, fixed shapes, nothing waits on the CPU."""

    NORMAL = "normal"
    LOW_LATENCY = "low_latency"


ModeFlag = Literal["auto", "normal", "low_latency"]


def resolve_dispatch_mode(flag: ModeFlag, *, any_rank_prefills: bool, max_tokens_per_rank: int, cap: int) -> DispatchMode:
    """The mode of a step, from what every rank knows: the flag and the step headers.

    `auto` is normal when any rank prefills or any rank holds more than `cap` tokens, else low-latency. `max_tokens_per_rank` counts
    the tokens that a rank dispatches. Raises ValueError when `low_latency` is demanded of a step that exceeds the cap (flags that
    would allow this are refused at start).
    """
    if flag == "normal":
        return DispatchMode.NORMAL
    if flag == "low_latency":
        if max_tokens_per_rank > cap:
            raise ValueError(
                f"a rank dispatches {max_tokens_per_rank} tokens in low-latency mode, whose cap is {cap}: lower "
                "--chunked-prefill-size or --max-running-requests, raise --deepep-max-dispatch-tokens-per-rank, "
                "or use --deepep-mode auto"
            )
        return DispatchMode.LOW_LATENCY
    if any_rank_prefills or max_tokens_per_rank > cap:
        return DispatchMode.NORMAL
    return DispatchMode.LOW_LATENCY
