"""DeepSeek-V3's expert choice on a GPU, a warp per token: from logits to weights and, if asked, to the replica of each choice.

Ties go to the lowest expert id. A NaN counts as less than any number, so that ids are distinct and real whatever the logits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import check_number, check_tensor
from moesaic.kernels.replica_choice import ReplicaTable
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

LOWEST = -1e30
"""What a NaN counts as: above "not a candidate", which is -inf."""


@triton.jit
def _mix(value: tl.tensor) -> tl.tensor:
    """As `kernels.replica_choice.mix`, on uint32."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def _replicas(
    ids: tl.tensor,
    places: tl.tensor,
    valid: tl.tensor,
    slots: tl.tensor,
    num_replicas: tl.tensor,
    step: tl.tensor,
    seed: tl.tensor,
    MOST: tl.constexpr,
    RANDOM: tl.constexpr,
) -> tl.tensor:
    """The slot of each choice; `places` number the choices of this step."""
    known = valid & (ids >= 0)
    turn = tl.zeros_like(ids)
    if RANDOM:
        stream = _mix(tl.load(step).to(tl.uint32) ^ _mix(seed.to(tl.uint32)))
        bits = _mix(places.to(tl.uint32) ^ stream)
        turn = (bits % tl.load(num_replicas + ids, mask=known, other=1).to(tl.uint32)).to(tl.int64)
    return tl.load(slots + ids * MOST + turn, mask=known, other=-1)


@triton.jit(do_not_specialize=["seed"])
def _gate_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    topk_ids: tl.tensor,
    topk_weights: tl.tensor,
    chosen_slots: tl.tensor,
    slots: tl.tensor,
    num_replicas: tl.tensor,
    step: tl.tensor,
    logits_stride: tl.tensor,
    scaling_factor: tl.tensor,
    seed: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    NORMALIZES: tl.constexpr,
    LOWEST: tl.constexpr,
    MOST: tl.constexpr,
    RANDOM: tl.constexpr,
    REPLICATES: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    groups, members = tl.arange(0, GROUPS_PADDED), tl.arange(0, SIZE_PADDED)
    expert = groups[:, None] * GROUP_SIZE + members[None, :]
    real = (groups < NUM_GROUPS)[:, None] & (members < GROUP_SIZE)[None, :]
    score = tl.sigmoid(tl.load(logits + token * logits_stride + expert, mask=real, other=0.0))
    choice = score + tl.load(bias + expert, mask=real, other=0.0)
    choice = tl.where(choice == choice, choice, LOWEST)  # noqa: PLR0124  only a NaN differs from itself
    choice = tl.where(real, choice, float("-inf"))
    if TOPK_GROUPS < NUM_GROUPS:
        best, place = tl.max(choice, axis=1, return_indices=True)
        second = tl.max(tl.where(members[None, :] == place[:, None], float("-inf"), choice), axis=1)
        group_score = best + second
        if GROUP_SIZE == 1:
            group_score = best
        others = tl.reshape(group_score, [1, GROUPS_PADDED])
        own = tl.reshape(group_score, [GROUPS_PADDED, 1])
        better = (others > own) | ((others == own) & (groups[None, :] < groups[:, None]))
        rank = tl.sum(better.to(tl.int32), axis=1)
        choice = tl.where((rank < TOPK_GROUPS)[:, None], choice, float("-inf"))
    candidates = tl.reshape(choice, [GROUPS_PADDED * SIZE_PADDED])
    lanes, ranks = tl.arange(0, GROUPS_PADDED * SIZE_PADDED), tl.arange(0, TOPK_PADDED)
    ids = tl.zeros([TOPK_PADDED], dtype=tl.int64)
    for k in tl.static_range(TOPK):
        place = tl.argmax(candidates, axis=0)
        ids = tl.where(ranks == k, place // SIZE_PADDED * GROUP_SIZE + place % SIZE_PADDED, ids)
        candidates = tl.where(lanes == place, float("-inf"), candidates)
    chosen = ranks < TOPK
    weights = tl.sigmoid(tl.load(logits + token * logits_stride + ids, mask=chosen, other=0.0))
    weights = tl.where(chosen, weights, 0.0)
    if NORMALIZES:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    tl.store(topk_ids + token * TOPK + ranks, ids, mask=chosen)
    tl.store(topk_weights + token * TOPK + ranks, weights * scaling_factor, mask=chosen)
    if REPLICATES:
        served = _replicas(ids, token * TOPK + ranks, chosen, slots, num_replicas, step, seed, MOST, RANDOM)
        tl.store(chosen_slots + token * TOPK + ranks, served, mask=chosen)


@triton.jit(do_not_specialize=["num_choices", "seed"])
def _replica_kernel(
    topk_ids: tl.tensor,
    chosen_slots: tl.tensor,
    slots: tl.tensor,
    num_replicas: tl.tensor,
    step: tl.tensor,
    num_choices: tl.tensor,
    seed: tl.tensor,
    MOST: tl.constexpr,
    RANDOM: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = places < num_choices
    ids = tl.load(topk_ids + places, mask=valid, other=-1)
    tl.store(chosen_slots + places, _replicas(ids, places, valid, slots, num_replicas, step, seed, MOST, RANDOM), mask=valid)


def grouped_topk(
    logits: Tensor,
    correction_bias: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """As `kernels.topk.grouped_topk`."""
    ids, weights, _ = _gate("grouped_topk", logits, correction_bias, None, num_groups, topk_groups, topk, normalize, scaling_factor)
    return ids, weights


def grouped_topk_slots(
    logits: Tensor,
    correction_bias: Tensor,
    table: ReplicaTable,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.topk.grouped_topk_slots`."""
    table.check("grouped_topk_slots", logits.shape[-1], logits)
    return _gate("grouped_topk_slots", logits, correction_bias, table, num_groups, topk_groups, topk, normalize, scaling_factor)


def _gate(
    function: str,
    logits: Tensor,
    bias: Tensor,
    table: ReplicaTable | None,
    num_groups: int,
    topk_groups: int,
    topk: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(function, logits, bias, num_groups, topk_groups, topk)
    num_tokens, num_experts = logits.shape
    ids = logits.new_empty(num_tokens, topk, dtype=torch.int64)
    weights, served = torch.empty_like(ids, dtype=torch.float32), ids if table is None else torch.empty_like(ids)
    group_size = num_experts // num_groups
    if num_tokens:
        launch(
            _gate_kernel,
            (num_tokens,),
            logits=logits,
            bias=bias,
            topk_ids=ids,
            topk_weights=weights,
            chosen_slots=None if table is None else served,
            slots=None if table is None else table.slots,
            num_replicas=None if table is None else table.num_replicas,
            step=None if table is None else table.step,
            logits_stride=logits.stride(0),
            scaling_factor=scaling_factor,
            seed=0 if table is None else table.seed,
            NUM_GROUPS=num_groups,
            GROUP_SIZE=group_size,
            GROUPS_PADDED=power_of_two(num_groups),
            SIZE_PADDED=power_of_two(group_size),
            TOPK_GROUPS=topk_groups,
            TOPK=topk,
            TOPK_PADDED=power_of_two(topk),
            NORMALIZES=normalize,
            LOWEST=LOWEST,
            MOST=1 if table is None else table.slots.shape[1],
            RANDOM=table is not None and table.step is not None,
            REPLICATES=table is not None,
            num_warps=1,
        )
    return ids, weights, served


def _check(function: str, logits: Tensor, bias: Tensor, num_groups: int, topk_groups: int, topk: int) -> None:
    check_tensor(function, "logits", logits, shape=(None, None), dtypes=(torch.float32,))
    num_experts = logits.shape[1]
    check_tensor(function, "correction_bias", bias, shape=(num_experts,), dtypes=(torch.float32,), like=logits)
    check_number(function, "num_groups", num_groups, at_least=1, at_most=num_experts)
    if num_experts % num_groups:
        raise ValueError(f"{function}: num_groups is {num_groups}, wanted a divisor of the {num_experts} experts")
    check_number(function, "topk_groups", topk_groups, at_least=1, at_most=num_groups)
    check_number(function, "topk", topk, at_least=1, at_most=topk_groups * (num_experts // num_groups))


def choose_replicas(topk_ids: Tensor, table: ReplicaTable) -> Tensor:
    """As `kernels.replica_choice.choose_replicas`."""
    check_tensor("choose_replicas", "topk_ids", topk_ids, shape=(None, None), dtypes=(torch.int64,), contiguous=True)
    table.check("choose_replicas", None, topk_ids)
    served = torch.empty_like(topk_ids)
    if topk_ids.numel():
        launch(
            _replica_kernel,
            (ceil_div(topk_ids.numel(), 256),),
            topk_ids=topk_ids,
            chosen_slots=served,
            slots=table.slots,
            num_replicas=table.num_replicas,
            step=table.step,
            num_choices=topk_ids.numel(),
            seed=table.seed,
            MOST=table.slots.shape[1],
            RANDOM=table.step is not None,
            TILE=256,
            num_warps=1,
        )
    return served
