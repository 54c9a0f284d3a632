"""The dispatch mode of a step, and whether a captured graph may run it: from the instance's role, the flags and the step headers.

One group of expert ranks can only be in one dispatch mode in one step, and only the low-latency one has fixed shapes. A unified
server therefore leaves it whenever any rank prefills; instances with a role never change. Pure; knows no backend and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from moesaic.launch.conflicts import Conflict
from moesaic.moe.dispatch_mode import DispatchMode, ModeFlag, resolve_dispatch_mode

Role = Literal["null", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("null", "prefill", "decode")
MODES: tuple[ModeFlag, ...] = ("auto", "normal", "low_latency")


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What all ranks know of a step from its headers. `max_tokens_per_rank`: tokens that the busiest rank dispatches; `cap`: the
    most that the low-latency layout takes."""

    any_rank_prefills: bool
    max_tokens_per_rank: int
    cap: int


@dataclass(frozen=True, kw_only=True)
class StepDecision:
    """`graph`: a captured graph may run the step. `reason` in a few words."""

    mode: DispatchMode
    graph: bool
    reason: str


def role_conflicts(role: Role, mode: ModeFlag) -> Iterator[Conflict]:
    """--deepep-mode against the role."""
    wrong = {"prefill": "low_latency", "decode": "normal"}.get(role)
    if mode == wrong:
        right = "normal" if role == "prefill" else "low_latency"
        why = {
            "prefill": "prompts bring more tokens than the low-latency layout takes",
            "decode": "the normal layout waits for counts on the CPU in every layer and can't be captured in a graph",
        }[role]
        yield Conflict(
            flags=f"--disaggregation-mode {role} --deepep-mode {mode}",
            reason=why,
            remedy=f"leave --deepep-mode out ({role} instances always take {right}), or use --disaggregation-mode null",
        )


def role_mode(role: Role, mode: ModeFlag) -> ModeFlag:
    """The rule for the steps of an instance: what `StepRules.mode` is to be. The flags don't conflict."""
    return {"prefill": "normal", "decode": "low_latency"}.get(role, mode)  # type: ignore[return-value]


def decide_step(role: Role, mode: ModeFlag, facts: StepFacts) -> StepDecision:
    """The mode of a step and whether it may run as a graph.

    Raises ValueError when the step does not fit a mode that it must take (flags that would allow this are refused at start).
    """
    rule = role_mode(role, mode)
    chosen = resolve_dispatch_mode(
        rule, any_rank_prefills=facts.any_rank_prefills, max_tokens_per_rank=facts.max_tokens_per_rank, cap=facts.cap
    )
    if chosen is DispatchMode.NORMAL:
        return StepDecision(mode=chosen, graph=False, reason=_why_normal(role, rule, facts))
    if facts.any_rank_prefills:
        return StepDecision(mode=chosen, graph=False, reason="a rank prefills: attention has no fixed shape")
    return StepDecision(mode=chosen, graph=True, reason="all ranks decode")


def _why_normal(role: Role, rule: ModeFlag, facts: StepFacts) -> str:
    if role == "prefill":
        return "a prefill instance"
    if rule == "normal":
        return "--deepep-mode normal"
    if facts.any_rank_prefills:
        return "a rank prefills, so all ranks take the normal mode"
    return f"a rank brings {facts.max_tokens_per_rank} tokens, more than the cap of {facts.cap}"


@dataclass(frozen=True, kw_only=True)
class Suitability:
    """A row of the compatibility table. Answers begin with yes or no."""

    role: Role
    mode: ModeFlag
    long_input: str
    long_output: str
    dp_attention: str
    graphs: str

    @property
    def name(self) -> str:
        return {"null": "unified", "prefill": "prefill instance", "decode": "decode instance"}[self.role]


def suitability(role: Role, mode: ModeFlag) -> Suitability:
    """What a legal pair of role and mode is good for, found by deciding typical steps."""
    cap = 128
    prompt = StepFacts(any_rank_prefills=True, max_tokens_per_rank=16 * cap, cap=cap)
    decode = StepFacts(any_rank_prefills=False, max_tokens_per_rank=cap, cap=cap)
    outcomes = {"prompt": _outcome(role, mode, prompt), "decode": _outcome(role, mode, decode)}
    decodes_low = outcomes["decode"] is not None and outcomes["decode"].mode is DispatchMode.LOW_LATENCY
    graphs = outcomes["decode"] is not None and outcomes["decode"].graph
    switches = role == "null" and mode == "auto"
    return Suitability(
        role=role,
        mode=mode,
        long_input="yes" if outcomes["prompt"] is not None else _no_prompt(role),
        long_output=_long_output(role, decodes_low),
        dp_attention="no: one prefilling rank takes all ranks out of low latency" if switches else "yes",
        graphs=("yes, in steps in which no rank prefills" if role == "null" else "yes") if graphs and role != "prefill" else "no",
    )


def suitability_table() -> list[Suitability]:
    """All legal pairs: the three modes of a unified server, then the instances with a role."""
    return [suitability(role, mode) for role, mode in product(ROLES, MODES) if not list(role_conflicts(role, mode))]


def render_suitability() -> list[tuple[str, ...]]:
    """The table as rows of text, the head first: for the resolution report and README."""
    head = ("instance", "--deepep-mode", "long input", "long output", "DP attention", "CUDA graphs")
    rows = [(row.name, row.mode, row.long_input, row.long_output, row.dp_attention, row.graphs) for row in suitability_table()]
    return [head, *rows]


def _outcome(role: Role, mode: ModeFlag, facts: StepFacts) -> StepDecision | None:
    """None: such a step can't be run."""
    try:
        return decide_step(role, mode, facts)
    except ValueError:
        return None


def _no_prompt(role: Role) -> str:
    return "no: prompts come from prefill instances" if role == "decode" else "no: a chunk must fit the low-latency cap"


def _long_output(role: Role, decodes_low: bool) -> str:
    if role == "prefill":
        return "no: decode instances go on from the first token"
    return "yes" if decodes_low else "no: decodes wait for counts and run without graphs"
