"""Steps under way: launched into the worker that runs forwards, their results not yet brought in.

How many may be under way is the caller's to say, and must follow from what all ranks of a DP group know: never from timing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moesaic.attention.page_allocator import PageArray
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.forward_worker import ForwardWorker, Pending
from moesaic.launch.engine.plan import Launch
from moesaic.launch.engine.profiling import Profiling
from moesaic.launch.engine.results import Results
from moesaic.launch.engine.step_job import Finish, StepJob, StepRunner


@dataclass(frozen=True, slots=True)
class _UnderWay:
    launch: Launch
    job: StepJob
    pending: Pending[Finish]


class Pipeline:
    """First in, first out."""

    def __init__(
        self, *, worker: ForwardWorker, runner: StepRunner, results: Results, profiling: Profiling, activity: Activity
    ) -> None:
        self._worker = worker
        self._runner = runner
        self._results = results
        self._profiling = profiling
        self._activity = activity
        self._steps: deque[_UnderWay] = deque()
        self._spoiled: list[PageArray] = []

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, launch: Launch, job: StepJob) -> None:
        """The next step; runs when those before it have."""
        self._steps.append(_UnderWay(launch, job, self._worker.submit(partial(self._runner.run, job))))

    def collect(self, *, leave: int = 0) -> None:
        """Bring in results until so many steps are left under way. Waits for them; raises what their forwards raised."""
        while len(self._steps) > leave:
            self._bring_in(self._steps.popleft())

    def close(self) -> None:
        """No more steps."""
        self._worker.close()

    def take_spoiled_pages(self) -> Tensor:
        """Pages freed since the last call whose KV the next step must clear before anyone gets them, int64 [P] on the CPU."""
        pages = np.concatenate(self._spoiled) if self._spoiled else np.empty(0, dtype=np.int32)
        self._spoiled.clear()
        return torch.from_numpy(pages.astype(np.int64))

    def clear_spoiled_pages(self, device: torch.device) -> None:
        """Clear them now, since others than steps may write to pages. Waits for what is under way, if there are any."""
        if self._spoiled:
            self.collect()
            self._runner.clear(self.take_spoiled_pages().to(device))

    def _bring_in(self, step: _UnderWay) -> None:
        self._activity.wait_for_forward()
        finish = step.pending.result()
        self._activity.enter("wait for the device")
        outcome = finish()
        self._activity.enter("exchange of failures")
        failure = self._runner.failure_of(outcome)
        self._activity.enter("results")
        if failure is None:
            spoiled = self._results.settle(step.launch, step.job, outcome)
        else:
            spoiled = self._results.fail(step.launch, str(failure))
        if len(spoiled):
            self._spoiled.append(spoiled)
        self._profiling.end_step(step.job.timeline)
