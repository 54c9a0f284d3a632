"""Expert choice of DeepSeek-V3: sigmoid scores, correction bias, group-limited top-k (DeepSeek-V3 report, section 2.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.replica_choice import ReplicaTable, choose_replicas_reference

LOWEST = -1e30
"""What a NaN counts as: less than any score, but a candidate."""


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
    """Router logits fp32 [T, E] -> (topk_ids int64 [T, K], topk_weights fp32 [T, K]).

    The bias decides which experts are chosen, never their weights. A group (of experts) scores the sum of its two best; only the
    experts of the `topk_groups` best groups compete. A token's ids are distinct and real even where its logits are NaN. Raises
    ValueError on a device.
    """
    if uses_triton(logits):
        from moesaic.kernels.triton import topk as device

        return device.grouped_topk(
            logits,
            correction_bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            topk=topk,
            normalize=normalize,
            scaling_factor=scaling_factor,
        )
    native = kernels_for(logits)
    if native is None or not logits.is_contiguous():
        return grouped_topk_reference(
            logits,
            correction_bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            topk=topk,
            normalize=normalize,
            scaling_factor=scaling_factor,
        )
    num_tokens, num_experts = logits.shape
    threads = torch.get_num_threads()
    ids = torch.empty(num_tokens, topk, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, topk)
    scratch = logits.new_empty(threads * (2 * num_experts + num_groups))
    native.grouped_topk(
        logits.data_ptr(),
        correction_bias.data_ptr(),
        num_tokens,
        num_experts,
        num_groups,
        topk_groups,
        topk,
        normalize,
        scaling_factor,
        ids.data_ptr(),
        weights.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return ids, weights


def grouped_topk_reference(
    logits: Tensor,
    correction_bias: Tensor,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    normalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """The same in torch, any device."""
    scores = logits.sigmoid()
    choice = scores + correction_bias
    choice = choice.masked_fill(choice.isnan(), LOWEST)
    if topk_groups < num_groups:
        grouped = choice.view(-1, num_groups, choice.shape[-1] // num_groups)
        best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_groups, dim=-1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best_groups, True)
        choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view_as(choice)
    topk_ids = choice.topk(topk, dim=-1).indices
    weights = scores.gather(1, topk_ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids, weights * scaling_factor


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
    """`grouped_topk` and the replica of each choice: (topk_ids, topk_weights, slots int64 [T, K]), one kernel on a device."""
    if uses_triton(logits):
        from moesaic.kernels.triton import topk as device

        return device.grouped_topk_slots(
            logits,
            correction_bias,
            table,
            num_groups=num_groups,
            topk_groups=topk_groups,
            topk=topk,
            normalize=normalize,
            scaling_factor=scaling_factor,
        )
    ids, weights = grouped_topk(
        logits,
        correction_bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        topk=topk,
        normalize=normalize,
        scaling_factor=scaling_factor,
    )
    return ids, weights, choose_replicas_reference(ids, table)
