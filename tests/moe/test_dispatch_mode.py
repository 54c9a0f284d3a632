"""The mode of a step is one pure function of the flag and the step headers; this is its whole table."""

from __future__ import annotations

import pytest

from moesaic.moe.dispatch_mode import DispatchMode, ModeFlag, resolve_dispatch_mode
from moesaic.moe.dispatcher import DispatchPlan

NORMAL, LOW_LATENCY, REFUSED = DispatchMode.NORMAL, DispatchMode.LOW_LATENCY, None
CAP = 128


@pytest.mark.parametrize(
    ("flag", "any_rank_prefills", "max_tokens", "expected"),
    [
        ("normal", False, 0, NORMAL),
        ("normal", False, CAP, NORMAL),
        ("normal", False, CAP + 1, NORMAL),
        ("normal", True, 0, NORMAL),
        ("normal", True, CAP, NORMAL),
        ("normal", True, CAP + 1, NORMAL),
        ("low_latency", False, 0, LOW_LATENCY),
        ("low_latency", False, CAP, LOW_LATENCY),
        ("low_latency", False, CAP + 1, REFUSED),
        ("low_latency", True, 0, LOW_LATENCY),
        ("low_latency", True, CAP, LOW_LATENCY),
        ("low_latency", True, CAP + 1, REFUSED),
        ("auto", False, 0, LOW_LATENCY),
        ("auto", False, CAP, LOW_LATENCY),
        ("auto", False, CAP + 1, NORMAL),
        ("auto", True, 0, NORMAL),
        ("auto", True, CAP, NORMAL),
        ("auto", True, CAP + 1, NORMAL),
    ],
)
def test_the_table(flag: ModeFlag, any_rank_prefills: bool, max_tokens: int, expected: DispatchMode | None) -> None:
    def resolve() -> DispatchMode:
        return resolve_dispatch_mode(flag, any_rank_prefills=any_rank_prefills, max_tokens_per_rank=max_tokens, cap=CAP)

    if expected is None:
        with pytest.raises(ValueError, match=rf"{max_tokens} tokens .* cap is {CAP}.*--deepep-mode auto"):
            resolve()
    else:
        assert resolve() is expected


def test_a_plan_knows_the_largest_rank() -> None:
    assert DispatchPlan(mode=NORMAL, num_tokens_per_rank=(3, 0, 7, 1)).max_tokens == 7
