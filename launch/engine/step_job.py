"""One step as the thread that runs forwards sees it: input tokens filled in, forward, sampling. All of a rank's tensors meet here.

Jobs run in the order of their launch. A job may be made before the one in front of it has run: the tokens that one samples are the
inputs of this one's decode rows, and what penalties count. They are handed on here, from job to job, without the scheduler.

A job gives the device its work and does not wait for it: whoever wants the outcome does. So a device never stands still between two
steps, unless penalties count the tokens of the first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moesaic.eplb.forward_mode import ForwardMode
from moesaic.kernels.gpu import Download
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.device_copies import to_device
from moesaic.launch.engine.failure_exchange import FailureExchange, Verdict
from moesaic.launch.engine.graph_plan import GraphStep
from moesaic.launch.engine.logprob_rows import PromptLogprobs, RowLogprobs, SampledLogprobs
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.recording import LoadRecording
from moesaic.launch.engine.retraction import Restoration
from moesaic.launch.engine.sampler import sample
from moesaic.launch.engine.sampling_rows import SamplingRows
from moesaic.launch.engine.sequence import Int64Array
from moesaic.launch.models.deepseek_v3 import LoadObserver
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.overlap.operations import OperationError
from moesaic.overlap.timeline import Timeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """What a step runs.

    inputs: with blank ids in the decode rows. split: parts of `inputs`, as views of its ids. graph: to replay instead.
    decode_slots int64 [D], sampled_slots int64 [S]: slots of the decode rows and of the sampled ones. known_slots, known_tokens
    int64 [K]: slots whose last token was not sampled here, and that token. restoration: KV to be copied back from host memory
    before the forward. num_tokens: of all DP ranks. spoiled_pages int64 [P]: their KV may hold NaN, which would reach those who get
    the pages next even where they are masked: cleared before the forward.
    """

    step: int
    mode: ForwardMode
    num_tokens: int
    inputs: ForwardInput
    split: ForwardSplit | None
    graph: GraphStep | None
    decode_slots: Tensor
    sampled_slots: Tensor
    known_slots: Tensor
    known_tokens: Tensor
    sampling: SamplingRows
    sampled_logprobs: SampledLogprobs | None
    prompt_logprobs: tuple[PromptLogprobs, ...]
    spoiled_pages: Tensor
    restoration: Restoration | None
    observer: LoadObserver | None
    recording: LoadRecording
    timeline: Timeline | None

    def on_device(self, device: torch.device) -> StepJob:
        """The job made on the CPU -> the same with its tensors on the device, in one copy that nobody waits for.

        Of a step that replays a graph the rows stay: they go from the CPU to the graph's own addresses (graph_inputs.py).
        """
        return to_device(self, device, leave=None if self.graph is None else self.inputs.metadata)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What came of it. verdict: whether the forward failed on some rank; if so, no rank uses anything of its outcome.

    failure: on this rank. tokens int64 [S]. bad_rows int64: numbers of the rows whose logits were not finite; they gave no token.
    """

    verdict: Verdict
    failure: OperationError | None = None
    tokens: Int64Array
    bad_rows: Int64Array
    sampled_logprobs: RowLogprobs | None = None
    prompt_logprobs: tuple[RowLogprobs, ...] = ()


Finish = Callable[[], StepOutcome]
"""Waits for the device, and says what came of a step. To be called once for every step, in their order, from any thread."""

_NO_ROWS: Int64Array = np.empty(0, dtype=np.int64)


class StepRunner:
    """Runs the jobs of one rank. `num_slots`: of the sequence table."""

    def __init__(self, *, runner: ModelRunner, num_slots: int, failures: FailureExchange, activity: Activity) -> None:
        self._runner = runner
        self._failures = failures
        self._activity = activity
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=runner.config.device)

    def clear(self, pages: Tensor) -> None:
        """Zero the KV of pages int64 [P]. No job is under way."""
        self._runner.clear_pages(pages)

    def run(self, job: StepJob) -> Finish:
        """Collective. Raises whatever can't be confined to the step."""
        self._activity.enter_forward(f"forward ({job.inputs.plan.mode.value} dispatch)", job.step)
        self._runner.timeline = job.timeline
        with contextlib.nullcontext() if job.timeline is None else job.timeline.step(job.step):
            return self._run(job)

    def failure_of(self, outcome: StepOutcome) -> OperationError | None:
        """What failed, on this rank or else on the lowest one where something did. Waits for the verdict."""
        failed = outcome.verdict.failed()
        if failed is None or outcome.failure is not None:
            return outcome.failure
        rank, code = failed
        return self._runner.model.failure_codes.error(code, rank)

    def _run(self, job: StepJob) -> Finish:
        if len(job.spoiled_pages):
            self._runner.clear_pages(job.spoiled_pages)
        if job.restoration is not None:
            self._runner.restore_pages(job.restoration.host_pages, job.restoration.pages)
        if len(job.known_slots):
            self._last_tokens.index_copy_(0, job.known_slots, job.known_tokens)
        num_decode = len(job.decode_slots)
        if num_decode:
            torch.index_select(self._last_tokens, 0, job.decode_slots, out=job.inputs.input_ids[:num_decode])
        failure, logits = None, None
        try:
            logits = self._runner.forward(job.inputs, job.observer, job.split, job.graph)
        except OperationError as error:
            if error.fatal:
                raise
            failure = error
        job.recording.end_step(job.num_tokens, job.mode, job.inputs.metadata.positions)
        verdict = self._failures.post(0 if failure is None else self._runner.model.failure_codes.code(failure))
        if logits is None:
            logger.error("step %d: %s", job.step, failure, exc_info=failure)
            return partial(StepOutcome, verdict=verdict, failure=failure, tokens=_NO_ROWS, bad_rows=_NO_ROWS)
        self._activity.enter_forward("sampling", job.step)
        return self._sampled(job, logits, verdict)

    def _sampled(self, job: StepJob, logits: Tensor, verdict: Verdict) -> Finish:
        """All that the CPU wants to know of a step is asked for at once."""
        num_rows = len(job.sampled_slots)
        results: list[Tensor] = []
        wanted = [each.compute(logits) for each in job.prompt_logprobs]
        if num_rows:
            rows = logits[:num_rows]
            tokens, is_finite = sample(rows, job.sampling.with_penalties(num_rows, logits.device))
            self._last_tokens.index_copy_(0, job.sampled_slots, tokens)
            results += [tokens, is_finite]
            if job.sampled_logprobs is not None:
                wanted.append(job.sampled_logprobs.compute(rows, tokens))
        arriving = Download(logits.device, *results, *(tensor for each in wanted for tensor in each.tensors))
        finish = partial(self._outcome, job, verdict, arriving, wanted)
        if not job.sampling.penalised:
            return finish
        outcome = finish()  # the next step's penalties count these tokens
        return lambda: outcome

    def _outcome(self, job: StepJob, verdict: Verdict, arriving: Download, wanted: list[RowLogprobs]) -> StepOutcome:
        """The one time that the CPU waits for the device."""
        arrived = iter(arriving.result())
        self._runner.verify()
        chosen, bad_rows = _NO_ROWS, _NO_ROWS
        if len(job.sampled_slots):
            chosen, bad_rows = next(arrived).numpy(), np.flatnonzero(~next(arrived).numpy())
            job.sampling.record(chosen)
        logprobs = [each.of(arrived) for each in wanted]
        return StepOutcome(
            verdict=verdict,
            tokens=chosen,
            bad_rows=bad_rows,
            sampled_logprobs=logprobs.pop() if len(logprobs) > len(job.prompt_logprobs) else None,
            prompt_logprobs=tuple(logprobs),
        )
