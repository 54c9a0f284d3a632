"""Runs every step that the ranks vote to split as two forwards, first half then second, and as one, for RankPool."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from engine_jobs import EngineSettings, make_engine
from joined_halves import join_row_ids
from torch import Tensor

from moesaic.launch.engine.batch import Batch, build_batch, forward_input
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import GenerateRequest
from moesaic.launch.engine.overlap_vote import propose_split
from moesaic.launch.engine.plan import Launch
from moesaic.launch.engine.step import SplitThresholds, Step, StepHeader, resolve_step
from moesaic.launch.models.forward import ForwardInput

DISTRIBUTION_THRESHOLD = 0.48


@dataclass(frozen=True)
class SplitStepSeen:
    """One rank's view of a step that was split. error: the largest difference of a logit between halves and whole."""

    extends: bool
    num_tokens: int
    inside_a_sequence: bool
    error: float


def split_job(rank: int, settings: EngineSettings, waves: list[list[GenerateRequest]]) -> list[SplitStepSeen]:
    """Request i of a wave goes to DP rank i % dp; a wave runs to its end before the next. Splits from 2 tokens on."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    place = settings.topology.place(rank)
    seen: list[SplitStepSeen] = []
    last_tokens = torch.zeros(settings.max_running, dtype=torch.int64)
    for wave in waves:
        for i, request in enumerate(wave):
            if i % settings.dp == place.dp_rank:
                engine.apply(request)
        while _step(engine, place.dp_rank, last_tokens, seen):
            pass
    return seen


def _step(engine: RankEngine, dp_rank: int, last_tokens: Tensor, seen: list[SplitStepSeen]) -> bool:
    """One lockstep step; False when no rank has work. last_tokens int64 [slots]: what each slot sampled last."""
    plan = engine.scheduler.schedule()
    proposal = propose_split(plan, DISTRIBUTION_THRESHOLD)
    header = StepHeader(
        num_decode=plan.num_decode,
        num_extend=plan.num_extend,
        num_logits=plan.num_logits,
        first_tokens=proposal.first_tokens,
        first_logits=proposal.first_logits,
        has_work=engine.scheduler.has_work(),
    )
    rules = replace(engine._rules, split_from=SplitThresholds(prefill=2, decode=2))
    step = resolve_step(engine._exchange.exchange(header), rules)
    if step.idle:
        return not step.quiet
    batch = build_batch(plan, engine.scheduler.table, engine.runner.config.page_size)
    batch.input_ids[: plan.num_decode] = last_tokens[torch.from_numpy(plan.decode_slots)]
    inputs = forward_input(batch, step)
    halves = _run_halves(engine, inputs, step, dp_rank)
    logits = engine.runner.forward(inputs)
    if halves is not None:
        error = float((halves - logits).abs().max()) if len(logits) else 0.0
        seen.append(_describe(step, batch, dp_rank, error))
        logits = halves
    _settle(engine, engine.scheduler.launch(plan), logits, last_tokens)
    return True


def _settle(engine: RankEngine, launch: Launch, logits: Tensor, last_tokens: Tensor) -> None:
    """Greedy tokens into the scheduler; what is complete goes."""
    scheduler = engine.scheduler
    for chunk in launch.plan.chunks:
        scheduler.settle_chunk(chunk)
    tokens = logits[: len(launch.slots)].argmax(dim=-1)
    last_tokens[torch.from_numpy(launch.slots)] = tokens
    scheduler.settle_tokens(launch, tokens.numpy())
    for slot in launch.slots[launch.positions + 1 >= scheduler.table.max_tokens[launch.slots]].tolist():
        scheduler.remove(scheduler.table.sequence(slot).rid)


def _run_halves(engine: RankEngine, inputs: ForwardInput, step: Step, dp_rank: int) -> Tensor | None:
    """Logits of the two halves in the whole's order, run before the whole, so that they find none of its KV. None: not split."""
    if step.split is None:
        return None
    cut = step.split.num_tokens[0][dp_rank]
    first, second = inputs.split(cut, step.split.plans, step.split.num_logits)
    return join_row_ids(engine.runner.forward(first), engine.runner.forward(second), inputs.logit_rows, cut)


def _describe(step: Step, batch: Batch, dp_rank: int, error: float) -> SplitStepSeen:
    assert step.split is not None
    cut = step.split.num_tokens[0][dp_rank]
    bounds = [(extend.start, extend.start + extend.length) for extend in batch.metadata.extends]
    return SplitStepSeen(
        extends=step.extends,
        num_tokens=step.num_tokens[dp_rank],
        inside_a_sequence=any(start < cut < stop for start, stop in bounds),
        error=error,
    )
