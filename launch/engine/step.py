"""The step header: what every rank tells all others before each lockstep forward, and what follows from it.

One all-gather of a few integers. From the headers alone every rank derives the same `Step`: how many tokens each rank dispatches,
in which mode, whether in two micro-batches, and whether there is anything to run.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields

import torch
import torch.distributed as dist

from moesaic.attention.dp_attention import share_bounds
from moesaic.launch.engine.graph_plan import GraphStep, graph_step
from moesaic.moe.dispatch_mode import DispatchMode, ModeFlag, resolve_dispatch_mode
from moesaic.moe.dispatcher import DispatchPlan


@dataclass(frozen=True, kw_only=True)
class StepHeader:
    """One rank's word. Ranks of one DP group say the same, but for `num_messages`, which only the leader's counts, and `rooms`.

    num_messages: messages that the DP group's leader has taken in during this step, to be applied at the start of the next one.
    control: id of the oldest control command not yet carried out (0: none). rebalance: the word of the rank's rebalance manager.
    first_tokens, first_logits: rows and logits of the rank's first micro-batch if the step is split in two; 0 tokens: its batch
    can't be split. rooms: what this rank sees of its rooms (`rooms.py`). has_work: the rank holds requests (running or waiting) or
    moves experts. stop: the rank was told to shut down.
    """

    num_decode: int = 0
    num_extend: int = 0
    num_logits: int = 0
    num_messages: int = 0
    control: int = 0
    rebalance: int = 0
    first_tokens: int = 0
    first_logits: int = 0
    rooms: int = 0
    has_work: bool = False
    stop: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_decode + self.num_extend


@dataclass(frozen=True, kw_only=True)
class SplitThresholds:
    """Tokens of a DP rank from which a step of this forward mode is split in two; None: never."""

    prefill: int | None = None
    decode: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """What turns headers into a step; equal on all ranks. `a2a`: each attention-TP rank dispatches its own share.

    `distribution_threshold`: share of the rows below which the smaller micro-batch is filled up from inside a sequence.
    `graph_rows`: numbers of rows for which decode steps were captured, ascending.
    """

    attn_tp_size: int
    a2a: bool
    mode: ModeFlag
    cap: int
    split_from: SplitThresholds = field(default_factory=SplitThresholds)
    distribution_threshold: float = 0.48
    graph_rows: tuple[int, ...] = ()

    @property
    def splits(self) -> bool:
        """Whether any step may be split."""
        return self.split_from != SplitThresholds()


@dataclass(frozen=True, kw_only=True)
class StepSplit:
    """A step's two micro-batches, first and second: their dispatch plans, and their tokens and logits per DP rank.

    A DP rank cuts its batch at row num_tokens[0][dp_rank].
    """

    plans: tuple[DispatchPlan, DispatchPlan]
    num_tokens: tuple[tuple[int, ...], tuple[int, ...]]
    num_logits: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """num_tokens and num_logits per DP rank.

    `extends`: some rank computes prompt tokens. `control`: the command that all ranks carry out now, 0 while some rank has not
    received it. `split`: None when the step runs straight. `graph`: what all ranks replay, padded; None: the step runs as it is,
    operation by operation. `idle`: nobody runs anything; `quiet`: nobody even has anything waiting.
    """

    num_tokens: tuple[int, ...]
    num_logits: tuple[int, ...]
    num_messages: tuple[int, ...]
    extends: bool
    control: int
    plan: DispatchPlan
    split: StepSplit | None
    graph: GraphStep | None
    idle: bool
    quiet: bool
    stop: bool


def resolve_split(leaders: list[StepHeader], rules: StepRules, *, extends: bool, mode: DispatchMode) -> StepSplit | None:
    """Headers of the DP groups' leaders, in DP rank order -> the two micro-batches, or None to run straight. Pure.

    The step runs straight when any rank that has tokens can't split them or has fewer than the threshold of the step's forward
    mode. A rank without tokens has no say: both its micro-batches are idle. Both micro-batches use the whole step's dispatch mode.
    """
    threshold = rules.split_from.prefill if extends else rules.split_from.decode
    busy = [header for header in leaders if header.num_tokens]
    if threshold is None or not busy or any(not header.first_tokens or header.num_tokens < threshold for header in busy):
        return None
    first = tuple(header.first_tokens for header in leaders)
    second = tuple(header.num_tokens - header.first_tokens for header in leaders)
    return StepSplit(
        plans=(_dispatch_plan(first, rules, mode), _dispatch_plan(second, rules, mode)),
        num_tokens=(first, second),
        num_logits=(
            tuple(header.first_logits for header in leaders),
            tuple(header.num_logits - header.first_logits for header in leaders),
        ),
    )


def _dispatch_plan(num_tokens: tuple[int, ...], rules: StepRules, mode: DispatchMode) -> DispatchPlan:
    return DispatchPlan(mode=mode, num_tokens_per_rank=_dispatched(num_tokens, rules), overlaps=True)


def _dispatched(num_tokens: tuple[int, ...], rules: StepRules) -> tuple[int, ...]:
    """Tokens per DP rank -> tokens that each rank dispatches."""
    if not rules.a2a:
        return num_tokens
    size = rules.attn_tp_size
    shares = (share_bounds(count, rank, size) for count in num_tokens for rank in range(size))
    return tuple(stop - start for start, stop in shares)


def resolve_step(headers: list[StepHeader], rules: StepRules) -> Step:
    """All ranks' headers, in rank order -> the step. Pure; raises ValueError as `resolve_dispatch_mode` does."""
    leaders = headers[:: rules.attn_tp_size]
    num_tokens = tuple(header.num_tokens for header in leaders)
    dispatched = _dispatched(num_tokens, rules)
    extends = any(header.num_extend for header in leaders)
    mode = resolve_dispatch_mode(
        rules.mode,
        any_rank_prefills=extends,
        max_tokens_per_rank=max(dispatched),
        cap=rules.cap,
    )
    graph = None
    if mode is DispatchMode.LOW_LATENCY and not extends and rules.graph_rows:
        graph = graph_step(num_tokens, rules.graph_rows, rules.split_from.decode)
    num_messages = tuple(header.num_messages for header in leaders)
    controls = {header.control for header in headers}
    has_work = any(header.has_work or header.num_messages for header in leaders)
    return Step(
        num_tokens=num_tokens,
        num_logits=tuple(header.num_logits for header in leaders),
        num_messages=num_messages,
        extends=extends,
        control=min(controls) if len(controls) == 1 else 0,
        plan=DispatchPlan(mode=mode, num_tokens_per_rank=dispatched),
        split=None if graph is not None else resolve_split(leaders, rules, extends=extends, mode=mode),
        graph=graph,
        idle=not any(num_tokens),
        quiet=not has_work and controls == {0},
        stop=any(header.stop for header in headers),
    )


class HeaderExchange:
    """All-gathers headers over `group` (always on the CPU); a single rank exchanges nothing."""

    def __init__(self, world_size: int, group: dist.ProcessGroup | None) -> None:
        self._world_size = world_size
        self._group = group
        self._width = len(fields(StepHeader))

    def exchange(self, header: StepHeader) -> list[StepHeader]:
        """Every rank's header, in rank order. Collective; raises RuntimeError after the group's deadline."""
        if self._world_size == 1:
            return [header]
        # An all-gather, sent as an all-to-all of copies: gloo takes 0.13 ms (p90 0.17) for that, for its all-gather 0.23 (p90 2.7).
        own = torch.tensor([int(value) for value in astuple(header)]).repeat(self._world_size)
        everyone = torch.empty_like(own)
        dist.all_to_all_single(everyone, own, group=self._group)
        return [_header(row) for row in everyone.view(self._world_size, self._width).tolist()]


def _header(row: list[int]) -> StepHeader:
    *counts, has_work, stop = row
    return StepHeader(
        num_decode=counts[0],
        num_extend=counts[1],
        num_logits=counts[2],
        num_messages=counts[3],
        control=counts[4],
        rebalance=counts[5],
        first_tokens=counts[6],
        first_logits=counts[7],
        rooms=counts[8],
        has_work=bool(has_work),
        stop=bool(stop),
    )
