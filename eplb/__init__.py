"""Expert load, placement and reports. Algorithms are pure functions on arrays; never knows models or servers."""

from moesaic.eplb.algorithm import rebalance_experts

__all__ = ["rebalance_experts"]
