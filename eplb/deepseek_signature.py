"""`rebalance_experts` with the signature of DeepSeek's EPLB: tensors in, tensors out, over the policies of algorithm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.eplb.algorithm import DEFAULT_TOLERANCE, AnyArray, place

TensorOrArray = Tensor | AnyArray


def rebalance_experts(
    weight: TensorOrArray,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    algorithm: str = "auto",
    previous: TensorOrArray | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """A placement for these loads; arguments and results mean what they mean in DeepSeek's EPLB.

    weight [L, E], or [W, L, E] for `auto` to see how loads vary over time (the others use the sum); any real dtype, not negative.
    num_replicas: slots in all; num_groups: groups of experts; where they divide among the nodes, a group is kept near one node.
    previous, for `auto`: physical_to_logical [L, R] now in force. It is kept but for few slots as long as the largest GPU load of
    a layer can be brought within 1 + tolerance times that of a solve from nothing.

    Returns int64 CPU tensors: physical_to_logical [L, R], the expert of each slot; logical_to_physical [L, E, most replicas], the
    slots of each expert, padded with -1; logical_count [L, E], its number of slots. Raises ValueError for unusable arguments.
    """
    placed, slots, count = place(
        weight.detach().to("cpu", torch.float64).numpy() if isinstance(weight, Tensor) else weight,
        num_replicas,
        num_groups,
        num_nodes,
        num_gpus,
        algorithm=algorithm,
        previous=previous.detach().cpu().numpy() if isinstance(previous, Tensor) else previous,
        tolerance=tolerance,
    )
    return torch.from_numpy(placed), torch.from_numpy(slots), torch.from_numpy(count)
