"""What follows from the step headers: pure, so its cases are a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.launch.engine.step import StepHeader, StepRules, resolve_step
from moesaic.moe.dispatch_mode import DispatchMode

RULES = StepRules(attn_tp_size=1, a2a=True, mode="auto", cap=8)
IDLE = StepHeader()
DECODE = StepHeader(num_decode=3, num_logits=3, has_work=True)
EXTEND = StepHeader(num_extend=5, num_logits=1, has_work=True)


@pytest.mark.parametrize(
    ("headers", "mode"),
    [
        ([DECODE, DECODE], DispatchMode.LOW_LATENCY),
        ([DECODE, IDLE], DispatchMode.LOW_LATENCY),
        ([DECODE, EXTEND], DispatchMode.NORMAL),
        ([EXTEND, IDLE], DispatchMode.NORMAL),
        ([replace(DECODE, num_decode=8), DECODE], DispatchMode.LOW_LATENCY),
        ([replace(DECODE, num_decode=9), DECODE], DispatchMode.NORMAL),
    ],
)
def test_the_mode_is_one_for_all_ranks(headers: list[StepHeader], mode: DispatchMode) -> None:
    assert resolve_step(headers, RULES).plan.mode is mode


def test_attention_tp_ranks_dispatch_shares() -> None:
    rules = replace(RULES, attn_tp_size=2)
    headers = [DECODE, DECODE, EXTEND, EXTEND]
    step = resolve_step(headers, rules)
    assert step.num_tokens == (3, 5)
    assert step.plan.num_tokens_per_rank == (2, 1, 3, 2)
    assert resolve_step(headers, replace(rules, a2a=False)).plan.num_tokens_per_rank == (3, 5)


def test_idle_and_quiet() -> None:
    assert resolve_step([IDLE, IDLE], RULES).quiet
    waiting = resolve_step([IDLE, replace(IDLE, has_work=True)], RULES)
    assert waiting.idle and not waiting.quiet
    announced = resolve_step([replace(IDLE, num_messages=2), IDLE], RULES)
    assert announced.idle and not announced.quiet and announced.num_messages == (2, 0)
    assert not resolve_step([DECODE, IDLE], RULES).idle


def test_a_control_command_runs_when_all_ranks_have_it() -> None:
    first = replace(IDLE, control=4)
    assert resolve_step([first, IDLE], RULES).control == 0
    assert not resolve_step([first, IDLE], RULES).quiet
    assert resolve_step([first, replace(DECODE, control=4)], RULES).control == 4
    assert resolve_step([IDLE, replace(IDLE, stop=True)], RULES).stop
