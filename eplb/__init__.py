"""Expert load, placement and reports. Algorithms are pure functions on arrays; never knows models or servers.

`rebalance_experts`, with the signature of DeepSeek's own, is imported on first use: it needs torch, the launcher does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.eplb.deepseek_signature import rebalance_experts

__all__ = ["rebalance_experts"]


def __getattr__(name: str) -> Any:
    if name != "rebalance_experts":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moesaic.eplb.deepseek_signature import rebalance_experts

    return rebalance_experts
