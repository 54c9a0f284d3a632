"""Which experts get replicas and where all lie: the entry point over the policies of `--eplb-algorithm`.

deepseek               DeepSeek's EPLB: hierarchical when the groups divide among the nodes, else global; its very results
deepseek_hierarchical  its hierarchical form, or an error
auto                   ours: nearer to the bound, with few moves from the placement before (algorithm_auto.py)

Pure functions on arrays. L sparse layers, E logical experts, W windows of time, R slots (num_replicas) on G GPUs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.algorithm_auto import Shape, place_automatically
from moesaic.eplb.algorithm_deepseek import place_hierarchically
from moesaic.eplb.algorithm_follow import count_replicas
from moesaic.eplb.expert_loads import ExpertLoads
from moesaic.eplb.location import ExpertLocation, Int64Array, logical_to_physical

ALGORITHMS = ("auto", "deepseek", "deepseek_hierarchical")
DEFAULT_TOLERANCE = 0.01

FloatArray = NDArray[np.float64]
AnyArray = NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64] | NDArray[np.int32]


def place(
    weight: AnyArray,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    algorithm: str = "auto",
    previous: AnyArray | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """`rebalance_experts` (deepseek_signature.py, which says what all of it means) from and to numpy arrays."""
    loads = _checked_loads(weight)
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    shape = _checked_shape(loads.shape[-1], sizes, algorithm)
    num_layers, num_experts = loads.shape[-2:]
    replica: Int64Array | None = None
    if algorithm == "auto":
        before = None if previous is None else _checked_previous(previous, num_layers, num_experts, shape)
        placed = place_automatically(_over_time(loads), shape, previous=before, tolerance=_checked_tolerance(tolerance))
    else:
        total = loads if loads.ndim == 2 else loads.sum(axis=0)
        placed, replica = place_hierarchically(
            total, num_slots=shape.num_slots, num_groups=shape.num_groups, num_nodes=shape.num_nodes, num_gpus=num_gpus
        )
    count = count_replicas(placed, num_experts)
    slots = logical_to_physical(placed, count) if replica is None else _by_replica(placed, replica, count)
    return placed, slots, count


def place_experts(
    weight: AnyArray,
    *,
    num_slots: int,
    ep_size: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    algorithm: str = "auto",
    previous: ExpertLocation | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> ExpertLocation:
    """`place` in the terms of this package: from and to an ExpertLocation."""
    before = None if previous is None else previous.physical_to_logical
    placed, _, _ = place(
        weight, num_slots, num_groups, num_nodes, ep_size, algorithm=algorithm, previous=before, tolerance=tolerance
    )
    return ExpertLocation(physical_to_logical=placed, num_experts=int(weight.shape[-1]), ep_size=ep_size, num_nodes=num_nodes)


def _over_time(loads: FloatArray) -> ExpertLoads:
    if loads.ndim == 2:
        return ExpertLoads(mean=loads)
    return ExpertLoads(mean=loads[0]) if len(loads) == 1 else ExpertLoads.of_windows(loads)


def _by_replica(placed: Int64Array, replica: Int64Array, count: Int64Array) -> Int64Array:
    """Slots of every expert in the order in which its replicas were made, [L, E, max]."""
    slots = np.full((*count.shape, int(count.max())), -1, dtype=np.int64)
    slots[np.arange(len(placed))[:, None], placed, replica] = np.arange(placed.shape[1])
    return slots


def _checked_loads(weight: AnyArray) -> FloatArray:
    """weight as float64 [L, E] or [W, L, E], a copy."""
    values = np.asarray(weight)
    if values.dtype.kind not in "iufb":
        raise ValueError(f"weight must hold real numbers, got dtype {values.dtype}")
    if values.ndim not in (2, 3) or 0 in values.shape:
        expected = "[layers, experts] or [windows, layers, experts], none of them 0"
        raise ValueError(f"weight must have shape {expected}, got {list(values.shape)}")
    loads: FloatArray = values.astype(np.float64)
    bad = ~np.isfinite(loads) | (loads < 0)
    if bad.any():
        *window, layer, expert = np.argwhere(bad)[0].tolist()
        where = f"expert {expert} of sparse layer {layer}" + (f" in window {window[0]}" if window else "")
        raise ValueError(f"weight of {where} is {loads[*window, layer, expert]}: a load must be finite and not negative")
    return loads


def _checked_shape(num_experts: int, sizes: dict[str, int], algorithm: str) -> Shape:
    """The shape to place for: with one group and one node where DeepSeek's choice is the global form."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"eplb algorithm {algorithm!r} is not known; there are {', '.join(ALGORITHMS)}")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    num_replicas, num_groups, num_nodes, num_gpus = sizes.values()
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas is {num_replicas}: too few slots for {num_experts} experts, each needs one")
    if num_replicas % num_gpus:
        raise ValueError(
            f"num_replicas {num_replicas} is not a multiple of num_gpus {num_gpus}; "
            f"the next that is: {num_replicas + num_gpus - num_replicas % num_gpus}"
        )
    if num_gpus % num_nodes:
        raise ValueError(f"num_gpus {num_gpus} is not a multiple of num_nodes {num_nodes}")
    if num_groups % num_nodes:
        if algorithm == "deepseek_hierarchical":
            raise ValueError(
                f"num_groups {num_groups} can't be split evenly over num_nodes {num_nodes}: use algorithm deepseek or auto"
            )
        return Shape(num_slots=num_replicas, num_gpus=num_gpus)
    if num_experts % num_groups:
        raise ValueError(f"{num_experts} experts can't be split evenly into num_groups {num_groups}")
    return Shape(num_slots=num_replicas, num_gpus=num_gpus, num_groups=num_groups, num_nodes=num_nodes)


def _checked_previous(previous: AnyArray, num_layers: int, num_experts: int, shape: Shape) -> Int64Array:
    values = np.asarray(previous)
    if values.shape != (num_layers, shape.num_slots) or values.dtype.kind not in "iu":
        raise ValueError(
            f"previous must be the expert of each slot, integers [{num_layers} layers, {shape.num_slots} slots]; "
            f"got {values.dtype} {list(values.shape)}"
        )
    location = ExpertLocation(
        physical_to_logical=values.astype(np.int64), num_experts=num_experts, ep_size=shape.num_gpus, num_nodes=shape.num_nodes
    )
    return location.physical_to_logical


def _checked_tolerance(tolerance: float) -> float:
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be a fraction of at least 0, such as 0.01; got {tolerance}")
    return tolerance
