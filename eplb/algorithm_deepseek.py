"""DeepSeek's greedy placement (github.com/deepseek-ai/EPLB), written anew with all layers at once; the same results in float32.

Three steps: pack expert groups to nodes, replicate the experts of every node within it, pack a node's replicas to its GPUs.
Greedy throughout: the expert with the largest load per replica gets the next slot; the heaviest piece goes to the least loaded pack
that has room. With one group and one node this is the "global" form.

    n problems solved side by side (layers, or nodes of layers), E experts, R slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.location import Int64Array

Loads = NDArray[np.floating[Any]]


def replicate_experts(load: Loads, num_slots: int, max_replicas: int | None = None) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Give the slots beyond one per expert, one by one, to the expert with the largest load per replica.

    This makes the largest load per replica as small as it can be. load [n, E]; an expert gets at most `max_replicas`, if given.
    Returns the expert of every slot int64 [n, R], which of its replicas that is int64 [n, R], and replicas per expert int64 [n, E].
    """
    num_rows, num_experts = load.shape
    rows = np.arange(num_rows)
    expert_of_slot = np.tile(np.arange(num_slots) % num_experts, (num_rows, 1))
    replica = np.zeros((num_rows, num_slots), dtype=np.int64)
    count = np.ones((num_rows, num_experts), dtype=np.int64)
    piece = load.copy()
    for slot in range(num_experts, num_slots):
        expert = piece.argmax(axis=1)
        expert_of_slot[:, slot] = expert
        replica[:, slot] = count[rows, expert]
        count[rows, expert] += 1
        piece[rows, expert] = load[rows, expert] / count[rows, expert].astype(load.dtype)
        if max_replicas is not None:
            piece[rows, expert] = np.where(count[rows, expert] < max_replicas, piece[rows, expert], -1)
    return expert_of_slot, replica, count


def pack_evenly(load: Loads, num_packs: int) -> tuple[Int64Array, Int64Array]:
    """Deal items to packs of equal size: heaviest item first, each to the least loaded pack that has room.

    load [n, items] -> the pack of every item and its position in the pack, both int64 [n, items].
    """
    num_rows, num_items = load.shape
    items_per_pack = num_items // num_packs
    if items_per_pack == 1:
        return np.tile(np.arange(num_items), (num_rows, 1)), np.zeros((num_rows, num_items), dtype=np.int64)
    order = np.argsort(-load, axis=1, kind="stable")
    in_order = np.take_along_axis(load, order, axis=1).T.copy()
    first_pack = np.arange(num_rows) * num_packs
    pack_in_order, position_in_order = np.empty((2, num_items, num_rows), dtype=np.int64)
    room_load = np.zeros((num_rows, num_packs), dtype=load.dtype)  # infinite once the pack is full
    of_pack, filled_of_pack = room_load.reshape(-1), np.zeros(num_rows * num_packs, dtype=np.int64)
    for rank in range(num_items):
        pack = room_load.argmin(axis=1)
        pack_in_order[rank] = pack
        pack += first_pack
        filled = filled_of_pack[pack]
        position_in_order[rank] = filled
        filled += 1
        filled_of_pack[pack] = filled
        new_load = of_pack[pack] + in_order[rank]
        new_load[filled == items_per_pack] = np.inf
        of_pack[pack] = new_load
    pack_of, position = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(pack_of, order, pack_in_order.T, axis=1)
    np.put_along_axis(position, order, position_in_order.T, axis=1)
    return pack_of, position


def place_hierarchically(
    load: NDArray[np.float64], *, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Int64Array, Int64Array]:
    """All three steps. load [L, E] -> the expert of every slot and which of its replicas that is, both int64 [L, R]."""
    weight = load.astype(np.float32)
    num_layers, num_experts = weight.shape
    grouped_experts: Int64Array = np.arange(num_experts).reshape(num_groups, -1)
    layers = np.arange(num_layers)[:, None]

    # 1. Groups to nodes; experts_of_node lists every layer's experts node by node.
    group_load: Loads = weight[:, grouped_experts].sum(axis=2, dtype=np.float32)
    node, position = pack_evenly(group_load, num_nodes)
    group_at = np.empty_like(node)
    group_at[layers, node * (num_groups // num_nodes) + position] = np.arange(num_groups)
    experts_of_node = grouped_experts[group_at].reshape(num_layers, num_experts)
    node_load = weight[layers, experts_of_node].reshape(num_layers * num_nodes, -1)

    # 2. Replicas within every node.
    local_expert, replica, count = replicate_experts(node_load, num_slots // num_nodes)
    problems = np.arange(len(node_load))[:, None]
    piece = np.divide(node_load, count, dtype=np.float32)[problems, local_expert]

    # 3. Replicas to GPUs.
    gpus_per_node = num_gpus // num_nodes
    gpu, position = pack_evenly(piece, gpus_per_node)
    slot = gpu * (num_slots // num_gpus) + position
    expert_at, replica_at = np.empty_like(local_expert), np.empty_like(replica)
    expert_at[problems, slot] = local_expert
    replica_at[problems, slot] = replica
    first_of_node = np.repeat(np.arange(num_nodes) * (num_experts // num_nodes), num_slots // num_nodes)
    physical_to_logical = experts_of_node[layers, expert_at.reshape(num_layers, num_slots) + first_of_node]
    return physical_to_logical, replica_at.reshape(num_layers, num_slots)
