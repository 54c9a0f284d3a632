"""Role, flag and step header decide the dispatch mode and whether a graph may run: the whole table."""

from __future__ import annotations

from itertools import product, takewhile
from pathlib import Path

import pytest

from moesaic.launch.disaggregation.roles import (
    MODES,
    ROLES,
    Role,
    StepFacts,
    decide_step,
    render_suitability,
    role_conflicts,
    role_mode,
)
from moesaic.moe.dispatch_mode import DispatchMode, ModeFlag

CAP = 128
NORMAL, LOW = DispatchMode.NORMAL, DispatchMode.LOW_LATENCY

# (any rank prefills, more tokens than the cap) -> what happens; None: refused
NONE_PREFILLS, PREFILL_FITS, PREFILL_TOO_LONG, DECODE_TOO_WIDE = (False, False), (True, False), (True, True), (False, True)
Outcome = tuple[DispatchMode, bool] | None
EVERY_STEP = (NONE_PREFILLS, PREFILL_FITS, PREFILL_TOO_LONG, DECODE_TOO_WIDE)
ALWAYS_NORMAL: dict[tuple[bool, bool], Outcome] = dict.fromkeys(EVERY_STEP, (NORMAL, False))
ALWAYS_LOW: dict[tuple[bool, bool], Outcome] = {
    NONE_PREFILLS: (LOW, True),
    PREFILL_FITS: (LOW, False),
    PREFILL_TOO_LONG: None,
    DECODE_TOO_WIDE: None,
}
SWITCHES: dict[tuple[bool, bool], Outcome] = {**ALWAYS_NORMAL, NONE_PREFILLS: (LOW, True)}
TABLE: dict[tuple[Role, ModeFlag], dict[tuple[bool, bool], Outcome]] = {
    ("null", "auto"): SWITCHES,
    ("null", "normal"): ALWAYS_NORMAL,
    ("null", "low_latency"): ALWAYS_LOW,
    ("prefill", "auto"): ALWAYS_NORMAL,
    ("prefill", "normal"): ALWAYS_NORMAL,
    ("decode", "auto"): ALWAYS_LOW,
    ("decode", "low_latency"): ALWAYS_LOW,
}


@pytest.mark.parametrize(("role", "mode"), TABLE)
def test_every_step_of_every_instance(role: Role, mode: ModeFlag) -> None:
    for (prefills, over_cap), expected in TABLE[role, mode].items():
        facts = StepFacts(any_rank_prefills=prefills, max_tokens_per_rank=CAP + over_cap, cap=CAP)
        if expected is None:
            with pytest.raises(ValueError, match="whose cap is 128"):
                decide_step(role, mode, facts)
        else:
            decision = decide_step(role, mode, facts)
            assert (decision.mode, decision.graph) == expected, decision.reason


def test_the_pairs_that_are_not_in_the_table_are_refused_with_a_way_out() -> None:
    for role, mode in product(ROLES, MODES):
        conflicts = [str(conflict) for conflict in role_conflicts(role, mode)]
        assert bool(conflicts) is ((role, mode) not in TABLE)

    (text,) = map(str, role_conflicts("decode", "normal"))
    assert "--disaggregation-mode decode --deepep-mode normal" in text
    assert "always take low_latency" in text


def test_instances_with_a_role_have_one_mode() -> None:
    assert role_mode("prefill", "auto") == "normal"
    assert role_mode("decode", "auto") == "low_latency"
    assert [role_mode("null", mode) for mode in MODES] == list(MODES)


def test_a_step_says_why_it_is_not_low_latency() -> None:
    prefilling = decide_step("null", "auto", StepFacts(any_rank_prefills=True, max_tokens_per_rank=1, cap=CAP))
    crowded = decide_step("null", "auto", StepFacts(any_rank_prefills=False, max_tokens_per_rank=200, cap=CAP))

    assert prefilling.reason == "a rank prefills, so all ranks take the normal mode"
    assert crowded.reason == "a rank brings 200 tokens, more than the cap of 128"


def test_the_rendered_table_is_the_published_one_with_the_roles_below() -> None:
    """REFERENCE.md: mode x long input x long output x DP attention x graphs."""
    head, *rows = render_suitability()
    answers = {row[:2]: tuple(cell.partition(":")[0].partition(",")[0] for cell in row[2:]) for row in rows}

    assert head[2:] == ("long input", "long output", "DP attention", "CUDA graphs")
    assert answers["unified", "normal"] == ("yes", "no", "yes", "no")
    assert answers["unified", "low_latency"] == ("no", "yes", "yes", "yes")
    assert answers["unified", "auto"] == ("yes", "yes", "no", "yes")
    assert answers["prefill instance", "auto"] == ("yes", "no", "yes", "no")
    assert answers["decode instance", "auto"] == ("no", "yes", "yes", "yes")
    assert len(rows) == len(TABLE)


def test_the_readme_shows_the_table_as_it_is_computed() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").splitlines()
    head, *rows = ["| " + " | ".join(row) + " |" for row in render_suitability()]
    start = readme.index(head)
    shown = list(takewhile(lambda line: line.startswith("|"), readme[start + 2 :]))
    assert shown == rows
