"""All ranks vote on splitting a step; from the headers alone each derives the same two micro-batches, or a straight step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine_jobs import EngineSettings, greedy_request, make_engine
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import RankPool
from split_jobs import SplitStepSeen, split_job
from tiny_models import TinyModel

from moesaic.launch.engine.batch import build_batch
from moesaic.launch.engine.overlap_vote import propose_split
from moesaic.launch.engine.plan import Plan
from moesaic.launch.engine.step import SplitThresholds, StepHeader, StepRules, resolve_step
from moesaic.moe.dispatch_mode import DispatchMode

Tiny = Callable[..., TinyModel]
RULES = StepRules(attn_tp_size=1, a2a=True, mode="auto", cap=64, split_from=SplitThresholds(prefill=16, decode=4))
IDLE = StepHeader()
DECODE = StepHeader(num_decode=6, num_logits=6, first_tokens=3, first_logits=3)
PREFILL = StepHeader(num_extend=31, num_logits=2, first_tokens=15, first_logits=1)
MIXED = StepHeader(num_decode=4, num_extend=14, num_logits=5, first_tokens=9, first_logits=4)


def test_a_split_step_says_each_ranks_halves() -> None:
    split = resolve_step([PREFILL, MIXED], RULES).split
    assert split is not None
    assert split.num_tokens == ((15, 9), (16, 9))
    assert split.num_logits == ((1, 4), (1, 1))
    assert [plan.num_tokens_per_rank for plan in split.plans] == [(15, 9), (16, 9)]
    assert [plan.mode for plan in split.plans] == [DispatchMode.NORMAL] * 2


def test_both_halves_keep_the_steps_dispatch_mode() -> None:
    """10 tokens exceed a cap of 8 and go normal; the halves of 5 would fit and still go normal, for all ranks alike."""
    big = replace(DECODE, num_decode=10, first_tokens=5)
    step = resolve_step([big, DECODE], replace(RULES, cap=8))
    assert step.split is not None
    assert {plan.mode for plan in (step.plan, *step.split.plans)} == {DispatchMode.NORMAL}
    low = resolve_step([DECODE, DECODE], RULES).split
    assert low is not None
    assert low.plans[0].mode is DispatchMode.LOW_LATENCY


def test_attention_tp_ranks_dispatch_their_share_of_each_half() -> None:
    headers = [PREFILL, PREFILL, MIXED, MIXED]
    split = resolve_step(headers, replace(RULES, attn_tp_size=2)).split
    assert split is not None
    assert split.num_tokens == ((15, 9), (16, 9))
    assert [plan.num_tokens_per_rank for plan in split.plans] == [(8, 7, 5, 4), (8, 8, 5, 4)]
    gathered = resolve_step(headers, replace(RULES, attn_tp_size=2, a2a=False)).split
    assert gathered is not None
    assert [plan.num_tokens_per_rank for plan in gathered.plans] == [(15, 9), (16, 9)]


def test_an_idle_rank_has_no_say_and_idles_in_both_halves() -> None:
    split = resolve_step([DECODE, IDLE], RULES).split
    assert split is not None
    assert split.num_tokens == ((3, 0), (3, 0))
    assert resolve_step([IDLE, IDLE], RULES).split is None


@pytest.mark.parametrize(
    "other",
    [
        StepHeader(num_decode=1, num_logits=1),
        StepHeader(num_decode=3, num_logits=3, first_tokens=1, first_logits=1),
        StepHeader(num_decode=8, num_logits=8),
    ],
    ids=["one row", "under the threshold", "can't be split"],
)
def test_one_rank_that_has_too_little_makes_all_run_straight(other: StepHeader) -> None:
    assert resolve_step([DECODE, other], RULES).split is None
    assert resolve_step([other, DECODE], RULES).split is None
    assert resolve_step([DECODE, DECODE], RULES).split is not None


def test_the_threshold_is_that_of_the_steps_forward_mode() -> None:
    """A rank that only decodes runs in a prefill step when another prefills: 6 tokens pay for decode, not for prefill."""
    assert resolve_step([DECODE, DECODE], RULES).split is not None
    assert resolve_step([DECODE, PREFILL], RULES).split is None
    assert resolve_step([PREFILL, PREFILL], replace(RULES, split_from=SplitThresholds(decode=4))).split is None
    assert resolve_step([DECODE, DECODE], replace(RULES, split_from=SplitThresholds(prefill=4))).split is None


HEADERS = st.builds(
    lambda decode, extend, share: StepHeader(num_decode=decode, num_extend=extend, first_tokens=int((decode + extend) * share)),
    st.integers(0, 30),
    st.integers(0, 30),
    st.floats(0, 0.99),
)


@given(headers=st.lists(HEADERS, min_size=1, max_size=5), attn_tp_size=st.integers(1, 4), a2a=st.booleans())
def test_halves_add_up_and_no_busy_rank_has_an_empty_one(headers: list[StepHeader], attn_tp_size: int, a2a: bool) -> None:
    rules = replace(RULES, attn_tp_size=attn_tp_size, a2a=a2a, split_from=SplitThresholds(prefill=2, decode=2))
    step = resolve_step([header for header in headers for _ in range(attn_tp_size)], rules)
    if step.split is None:
        return
    for whole, first, second in zip(step.num_tokens, *step.split.num_tokens, strict=True):
        assert first + second == whole
        assert (first > 0) == (second > 0) == (whole > 0)
    assert sum(sum(plan.num_tokens_per_rank) for plan in step.split.plans) == sum(step.plan.num_tokens_per_rank)


def test_no_work_and_one_row_propose_no_split(tiny: Tiny) -> None:
    engine = make_engine(EngineSettings(model_path=str(tiny("plain").folder)))
    assert propose_split(engine.scheduler.schedule(), 0.48).first_tokens == 0
    engine.apply(greedy_request(0, [5], 2))
    assert propose_split(engine.scheduler.schedule(), 0.48).first_tokens == 0


def test_a_proposal_counts_the_logits_that_the_first_half_really_has(tiny: Tiny) -> None:
    """Decode rows, chunks that end and that don't, prompt logprobs: at several cuts, against the batch itself."""
    engine = make_engine(EngineSettings(model_path=str(tiny("plain").folder), chunk_tokens=30))
    engine.apply(greedy_request(0, [5, 6, 7], 4))
    engine.step()
    engine.apply(greedy_request(1, list(range(2, 13)), 4, return_logprob=True, logprob_start_len=0))
    engine.apply(greedy_request(2, list(range(20, 27)), 4, return_logprob=True, logprob_start_len=3))
    engine.apply(greedy_request(3, list(range(40, 80)), 4))
    plan = engine.scheduler.schedule()
    assert (plan.num_decode, [chunk.completes for chunk in plan.chunks]) == (1, [True, True, False])
    checked = set()
    for threshold in (0.0, 0.48):
        for num_chunks in range(len(plan.chunks) + 1):
            part = Plan(plan.decode_slots, plan.chunks[:num_chunks])
            proposal = propose_split(part, threshold)
            batch = build_batch(part, engine.scheduler.table, 4)
            assert proposal.first_logits == int((batch.logit_rows < proposal.first_tokens).sum())
            checked.add(proposal.first_tokens)
    assert len(checked) > 3


@pytest.mark.parametrize("a2a", ["none", "torch"])
@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (2, 1)], ids=["DP 2", "attention TP 2"])
def test_halves_by_the_vote_run_through_real_dispatchers_and_give_the_wholes_logits(
    rank_pool: RankPool, tiny: Tiny, tp: int, dp: int, a2a: str
) -> None:
    """Prompts on cached prefixes, decode, and at the end a rank alone with an idle one; first half, then second, then whole."""
    settings = EngineSettings(model_path=str(tiny("plain").folder), tp=tp, dp=dp, ep=2, a2a=a2a)
    prompt = torch.randint(2, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    waves = [
        [greedy_request(0, prompt[:9], 3), greedy_request(1, prompt[:16], 3)],
        [greedy_request(2, prompt[:30], 6, return_logprob=True, logprob_start_len=0), greedy_request(3, prompt, 3)],
        [greedy_request(4, prompt[:5], 8), greedy_request(5, prompt[3:22], 3), greedy_request(6, prompt[5:9], 8)],
    ]
    seen: list[SplitStepSeen] = [step for rank in rank_pool.run(tp, split_job, settings, waves) for step in rank]
    assert max(step.error for step in seen) < 1e-4
    assert {step.extends for step in seen} == {True, False}, "prefill and decode steps were split"
    assert any(step.inside_a_sequence for step in seen)
    assert dp == 1 or any(step.num_tokens == 0 for step in seen), "a rank idled through a split step"
