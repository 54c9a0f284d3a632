"""Timelines of steps whose messages are a library's or a kernel's: jobs for a RankPool."""

from __future__ import annotations

import symm_jobs
import torch
from engine_jobs import EngineSettings
from forward_jobs import ForwardCase, Forwards

from moesaic.launch.models.timeline_marks import TimelineMarks
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.overlap.operations import Operation, State, run_stage
from moesaic.overlap.timeline import Timeline
from moesaic.overlap.trace import Trace


def steps_job(rank: int, settings: EngineSettings, cases: list[ForwardCase]) -> list[Trace]:
    """Each case's step, recorded."""
    forwards, traces = Forwards(settings, rank), []
    for case in cases:
        timeline = forwards.runner.timeline = Timeline(rank=rank)
        forwards.run(case)
        forwards.runner.timeline = None
        traces.append(timeline.trace())
    return traces


def symm_job(rank: int, world: int, counts: tuple[int, ...]) -> Trace:
    """One exchange over shared memory as operations of layer 3."""
    ranks, timeline = symm_jobs.Ranks(rank, world), Timeline(rank=rank)
    ranks.communications.marks = TimelineMarks(timeline)
    hidden, topk = ranks.inputs(counts[rank], 0)
    plan = DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=counts)
    symm = ranks.symm

    def experts(state: State) -> None:
        received = state.take("received")
        state.put("rows", ranks.runner.run(received.rows))
        state.put("handle", received.handle)

    operations = {
        "dispatch_a": lambda state: state.put("handle", symm.dispatch_a(hidden, topk, plan)),
        "dispatch_b": lambda state: state.put("received", symm.dispatch_b(state.take("handle"))),
        "experts": experts,
        "combine_a": lambda state: state.put("handle", symm.combine_a(state.take("rows"), state.take("handle"))),
        "combine_b": lambda state: state.put("sums", symm.combine_b(state.take("handle"))),
    }
    state = State()
    with torch.inference_mode():
        run_stage([Operation(name, call, 3) for name, call in operations.items()], state, 0, timeline)
    return timeline.trace()
