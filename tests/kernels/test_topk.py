"""Expert choice equals HF's DeepseekV3TopkRouter; the bias decides the choice and never the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moesaic.kernels.topk import grouped_topk, grouped_topk_reference


def _hf(logits: Tensor, bias: Tensor, *, groups: int, topk_groups: int, topk: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """HF's router, given the identity as its weight so that its logits are ours; sorted by expert id."""
    num_experts = logits.shape[1]
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=num_experts,
            n_routed_experts=num_experts,
            num_experts_per_tok=topk,
            n_group=groups,
            topk_group=topk_groups,
            norm_topk_prob=normalize,
            routed_scaling_factor=2.5,
        )
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
        router.e_score_correction_bias.copy_(bias)
        _, weights, ids = router(logits)
    return _sorted(ids, weights)


def _sorted(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    ids, order = ids.sort(-1)
    return ids, weights.gather(1, order)


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 20),
    groups=st.sampled_from([1, 2, 4, 8]),
    group_size=st.integers(2, 12),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_choice_and_weights_equal_those_of_transformers(
    num_tokens: int, groups: int, group_size: int, seed: int, data: st.DataObject
) -> None:
    normalize = data.draw(st.booleans())
    topk_groups = data.draw(st.integers(1, groups))
    topk = data.draw(st.integers(1, topk_groups * group_size))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, groups * group_size, generator=generator)
    bias = torch.randn(groups * group_size, generator=generator) * 0.3
    ids, weights = grouped_topk(
        logits, bias, num_groups=groups, topk_groups=topk_groups, topk=topk, normalize=normalize, scaling_factor=2.5
    )
    assert ids.shape == weights.shape == (num_tokens, topk)
    assert weights.dtype == torch.float32
    expected_ids, expected_weights = _hf(logits, bias, groups=groups, topk_groups=topk_groups, topk=topk, normalize=normalize)
    ids, weights = _sorted(ids, weights)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


def _choose(logits: Tensor, bias: Tensor, **changes: int | bool) -> tuple[Tensor, Tensor]:
    options = {"num_groups": 1, "topk_groups": 1, "topk": 2, "normalize": False} | changes
    return grouped_topk(logits, bias, scaling_factor=1.0, **options)  # type: ignore[arg-type]


def test_the_bias_decides_the_choice_but_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, -2.0]])
    ids, weights = _choose(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert set(ids[0].tolist()) == {0, 3}
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, ids))


def test_an_expert_of_a_losing_group_is_never_chosen() -> None:
    """Group 0 holds the best expert, but its two best sum to less than group 1's."""
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    assert _choose(logits, torch.zeros(4), topk=1)[0].tolist() == [[0]]
    assert _choose(logits, torch.zeros(4), topk=1, num_groups=2)[0].item() in (2, 3)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_normalised_weights_sum_to_the_scaling_factor(factor: float) -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    _, weights = grouped_topk(logits, torch.zeros(16), num_groups=4, topk_groups=2, topk=4, normalize=True, scaling_factor=factor)
    torch.testing.assert_close(weights.sum(-1), torch.full((5,), factor))


@pytest.mark.parametrize("choose", [grouped_topk, grouped_topk_reference])
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, 1), (4, 2)])
def test_a_tokens_experts_are_distinct_and_real_whatever_its_logits_are(
    choose: Callable[..., tuple[Tensor, Tensor]], num_groups: int, topk_groups: int
) -> None:
    """Dispatchers count on it: two rows of one token for one expert would not fit where they have to go."""
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    whole, _ = choose(
        logits, torch.zeros(16), num_groups=num_groups, topk_groups=topk_groups, topk=8, normalize=True, scaling_factor=1.0
    )
    logits[1], logits[2], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :14] = torch.nan
    ids, _ = choose(
        logits, torch.zeros(16), num_groups=num_groups, topk_groups=topk_groups, topk=8, normalize=True, scaling_factor=1.0
    )
    for row in ids.tolist():
        assert len(set(row)) == 8 and all(0 <= expert < 16 for expert in row)
    assert set(ids[4, :2].tolist()) == {14, 15}, "a number goes before a NaN"
    assert torch.equal(ids[[0, 5]], whole[[0, 5]])
