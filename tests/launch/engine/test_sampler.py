"""The sampler draws from the right distribution, stays inside the filters, and treats each row as if it were alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.kernels.random_bits import gumbel_noise, random_bits, row_keys
from moesaic.launch.engine import sampler
from moesaic.launch.engine.penalties import Penalties, TokenHistory
from moesaic.launch.engine.sampler import SamplingBatch, token_logprobs

NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": 0, "position": 0}


def batch_of(rows: Sequence[dict[str, Any]], **kwargs: Any) -> SamplingBatch:
    """One row per dict of parameters that are not neutral."""
    return SamplingBatch.make(**{name: [{**NEUTRAL, **row}[name] for row in rows] for name in NEUTRAL}, **kwargs)


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Tokens of rows that all can be sampled."""
    tokens, is_finite = sampler.sample(logits, batch)
    assert is_finite.all()
    return tokens


def draw(logits: torch.Tensor, num: int, **params: Any) -> np.ndarray[Any, Any]:
    """`num` tokens from one distribution [V], at positions 0, 1, 2, ..."""
    batch = batch_of([{**params, "position": position} for position in range(num)])
    return sample(logits.expand(num, -1), batch).numpy()


def logits_like(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def nucleus(logits: np.ndarray[Any, Any], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be chosen, in plain float64; mass within 1e-5 of a limit counts as inside."""
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    probs = np.exp(scaled) / np.exp(scaled).sum()
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    kept = order[: top_k if top_k > 0 else None]
    kept = kept[before[: len(kept)] <= top_p + 1e-5]
    return {int(token) for token in kept if probs[token] >= min_p * probs.max() * (1 - 1e-5)}


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_softmax(vary: str) -> None:
    num, vocab_size, temperature = 20_000, 40, 1.7
    logits = logits_like(1, vocab_size)[0]
    batch = batch_of([{"temperature": temperature, vary: index} for index in range(num)])
    counts = np.bincount(sample(logits.expand(num, -1), batch).numpy(), minlength=vocab_size)
    expected = torch.softmax(logits.double() / temperature, dim=-1).numpy() * num
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 72.06, "99.9% quantile of chi-square with 39 degrees of freedom"


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    num, logits = 20_000, torch.arange(12.0) / 3
    counts = np.bincount(draw(logits, num, top_k=5), minlength=12)
    expected = torch.softmax(logits[7:].double(), dim=-1).numpy() * num
    assert counts[:7].sum() == 0
    assert ((counts[7:] - expected) ** 2 / expected).sum() < 18.47, "99.9% quantile, 4 degrees of freedom"


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.sampled_from([2, 17, 1024, 1500]),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([-1, 1, 2, 5, 1023, 1024, 1200, 10**6]),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    levels=st.integers(1, 64),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_tokens_come_from_the_nucleus_only(
    *, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float, levels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed % 2**32)
    logits = (rng.integers(0, levels, vocab_size) / 4).astype(np.float32)  # few levels: many ties
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    drawn = set(draw(torch.from_numpy(logits), 50, **params).tolist())
    assert drawn <= nucleus(logits, temperature, top_k, top_p, min_p)


def test_every_token_of_a_small_nucleus_is_reached() -> None:
    logits = logits_like(1, 50)[0]
    allowed = nucleus(logits.numpy(), 2.0, 6, 0.9, 0.1)
    assert set(draw(logits, 4000, temperature=2.0, top_k=6, top_p=0.9, min_p=0.1).tolist()) == allowed


def test_a_nucleus_beyond_the_head_is_found_exactly() -> None:
    logits = torch.zeros(5000)
    assert draw(logits, 3000, top_p=0.5).max() == 2500, "flat: half the mass is the first 2,500 tokens, plus one"
    assert draw(logits, 3000, top_k=2000).max() == 1999


def test_ties_at_the_cut_go_by_token_id() -> None:
    assert set(draw(torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]), 500, top_k=3).tolist()) == {0, 1, 2}


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    for rows in ([{"temperature": 0.0}] * 3, [{"top_k": 1}] * 3):
        assert sample(logits, batch_of(rows)).tolist() == [1, 0, 2]


def test_a_row_is_bitwise_the_same_alone_and_among_strangers() -> None:
    rng, vocab_size = np.random.default_rng(1), 2051  # odd, and 16 times the head
    rows = [
        {
            "temperature": float(rng.choice([0.0, 0.7, 1.5])),
            "top_p": float(rng.choice([1.0, 0.9, 0.5])),
            "top_k": int(rng.choice([-1, 1, 40, 1500])),
            "min_p": float(rng.choice([0.0, 0.02])),
            "seed": int(rng.integers(100)),
            "position": int(rng.integers(5000)),
        }
        for _ in range(48)
    ]
    logits = logits_like(len(rows), vocab_size) / 4
    together = sample(logits, batch_of(rows)).tolist()
    alone = [sample(logits[i : i + 1], batch_of([row])).item() for i, row in enumerate(rows)]
    order = rng.permutation(len(rows))
    shuffled = sample(logits[order], batch_of([rows[i] for i in order]))
    assert together == alone
    assert shuffled[np.argsort(order)].tolist() == together
    assert len(set(together)) > 30, "the test would show nothing if all rows agreed"


def test_noise_depends_on_nothing_but_its_key_and_token() -> None:
    keys = row_keys(torch.arange(9), torch.arange(9) * 1000)
    noise = gumbel_noise(keys, 1003)
    assert noise.isfinite().all()
    for row in range(9):
        assert torch.equal(gumbel_noise(keys[row : row + 1], 1003)[0], noise[row])
    assert torch.equal(gumbel_noise(keys, 77), noise[:, :77])


def test_neighbouring_seeds_positions_and_tokens_give_unrelated_bits() -> None:
    base = random_bits(row_keys(torch.tensor([5]), torch.tensor([7])), 65536)[0]
    near = {
        "seed": random_bits(row_keys(torch.tensor([6]), torch.tensor([7])), 65536)[0],
        "position": random_bits(row_keys(torch.tensor([5]), torch.tensor([8])), 65536)[0],
        "swapped": random_bits(row_keys(torch.tensor([7]), torch.tensor([5])), 65536)[0],
        "token": base.roll(1),
    }
    for name, other in near.items():
        for bit in range(32):
            share = (((base ^ other) >> bit) & 1).double().mean().item()
            assert abs(share - 0.5) < 0.01, f"bit {bit} of neighbours by {name} differs in {share:.3f} of cases"


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel_noise(row_keys(torch.arange(20), torch.zeros(20, dtype=torch.int64)), 50_000).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.005)
    for value in (-1.0, 0.0, 2.0, 6.0, 10.0):
        expected = 1 - np.exp(-np.exp(-value))
        tail = (noise > value).double().mean().item()
        assert tail == pytest.approx(expected, abs=4 * (expected / noise.numel()) ** 0.5)


def test_penalties_match_the_direct_formula() -> None:
    prompts, outputs = [[1, 1, 2], [4], [3]], [[2, 5, 5, 5], [], [0]]
    frequency, presence, repetition = [0.5, 0.0, 1.0], [0.25, 0.0, -0.5], [1.3, 2.0, 1.0]
    logits = logits_like(4, 6)
    expected = logits.clone()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for token in range(6):
            value = logits[row, token].item() - frequency[row] * output.count(token) - presence[row] * (token in output)
            if token in prompt or token in output:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            expected[row, token] = value
    histories: list[tuple[int, TokenHistory]] = []
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        histories.append((row, TokenHistory(prompt)))
        for token in output:
            histories[-1][1].append(token)
    penalties = Penalties.make(frequency=[*frequency, 0], presence=[*presence, 0], repetition=[*repetition, 1], histories=histories)
    scores = logits.clone()
    penalties.apply_(scores)
    torch.testing.assert_close(scores, expected)
    before = logits.clone()
    greedy = batch_of([{"temperature": 0.0}] * 4, penalties=penalties)
    assert sample(logits, greedy).tolist() == expected.argmax(dim=-1).tolist()
    assert torch.equal(logits, before), "the model's logits are still needed for logprobs"


def test_a_history_grows_past_its_first_capacity() -> None:
    history = TokenHistory([])
    for token in [*range(100), *range(50)]:
        history.append(token)
    assert history.token_ids.tolist() == list(range(100))
    assert history.output_counts.tolist() == [2.0] * 50 + [1.0] * 50


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_chosen(temperature: float) -> None:
    logits = torch.tensor([[9.0, 8.0, 0.0], [9.0, 8.0, 0.0]])
    batch = batch_of([{"temperature": temperature}] * 2, banned=[(0, [0, 1])])
    for position in range(20):
        tokens = sample(logits, dataclasses.replace(batch, position=torch.full((2,), position)))
        assert tokens[0] == 2
        assert tokens[1] != 2


@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_numbers_are_told_and_the_others_get_their_tokens(parameters: dict[str, Any], bad: float) -> None:
    """A row's token is an input of the next step before anyone has looked: it must be one, whatever the logits were."""
    logits = logits_like(4, 3000)
    whole = sample(logits, batch_of([parameters] * 4))
    logits[1, 3] = logits[2, 9] = bad
    tokens, is_finite = sampler.sample(logits, batch_of([parameters] * 4))
    assert is_finite.tolist() == [True, False, False, True]
    assert torch.equal(tokens[is_finite], whole[is_finite])
    assert ((tokens >= 0) & (tokens < 3000)).all()


def test_a_row_with_no_token_left_is_told() -> None:
    _, is_finite = sampler.sample(torch.zeros(1, 2), batch_of([{}], banned=[(0, [0, 1])]))
    assert is_finite.tolist() == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_the_tokens_of_their_float32_values(dtype: torch.dtype) -> None:
    logits = logits_like(32, 300).to(dtype)
    batch = batch_of([{"temperature": 0.0 if i % 3 else 1.0, "top_p": 0.8 + 0.2 * (i % 2), "seed": i} for i in range(32)])
    assert sample(logits, batch).tolist() == sample(logits.float(), batch).tolist()


def test_extreme_temperatures_stay_finite() -> None:
    logits = torch.tensor([500.0, 499.0, -500.0])
    assert set(draw(logits, 50, temperature=1e-5).tolist()) == {0}
    assert set(draw(logits, 300, temperature=1e6).tolist()) == {0, 1, 2}


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_like(10, 64)
    batch = batch_of([{"seed": i, "top_k": 5 if i % 2 else -1} for i in range(10)])
    whole = sample(logits, batch)
    monkeypatch.setattr("moesaic.launch.engine.sampler._CHUNK_ELEMENTS", 150)
    assert torch.equal(sample(logits, batch), whole)


def test_logprobs_are_the_models_own() -> None:
    logits = logits_like(5, 30)
    tokens = torch.tensor([0, 29, 3, 3, 7])
    chosen, values, ids = token_logprobs(logits.to(torch.bfloat16), tokens, 4)
    expected = torch.log_softmax(logits.to(torch.bfloat16).double(), dim=-1)
    assert chosen.dtype == values.dtype == torch.float32
    torch.testing.assert_close(chosen.double(), expected[torch.arange(5), tokens], atol=1e-5, rtol=0)
    torch.testing.assert_close(values.double(), expected.topk(4).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(1, ids), expected.topk(4).values)
    assert token_logprobs(logits, tokens, 0)[1].shape == (5, 0)
