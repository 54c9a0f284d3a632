"""Forwards of one rank without an engine: synthetic batches in lockstep, straight or as two micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from engine_jobs import EngineSettings, make_runner
from torch import Tensor

from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.step import SplitThresholds, Step, StepHeader, StepRules, resolve_step
from moesaic.launch.engine.synthetic_batch import PoolShape, SyntheticBatch, decode_batch, prefill_batch
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.overlap.split import split_row


@dataclass(frozen=True, kw_only=True)
class ForwardCase:
    """A step in which every DP rank has `num_tokens`: of two prompts or more, or, with `decode`, of as many sequences."""

    num_tokens: int = 12
    decode: bool = False
    split: bool = False


class Forwards:
    """One rank's model and the steps it runs."""

    def __init__(self, settings: EngineSettings, rank: int) -> None:
        torch.set_num_threads(1)
        self.runner: ModelRunner = make_runner(settings, rank)
        self._rules = StepRules(
            attn_tp_size=settings.topology.attn_tp_size,
            a2a=settings.a2a != "none",
            mode=settings.mode,  # type: ignore[arg-type]
            cap=settings.cap,
            split_from=SplitThresholds(prefill=2, decode=2),
        )
        self._pool = PoolShape(num_pages=settings.num_pages, page_size=settings.page_size, context_length=settings.context_length)

    def run(self, case: ForwardCase) -> Tensor:
        """Logits of the step's sequences, or whatever the forward raises. Collective."""
        batch = self._batch(case)
        cut = split_row(batch.num_decode, batch.chunk_lengths, self._rules.distribution_threshold)
        assert cut is not None, "two sequences can be split"
        step = self._step(batch, cut)
        inputs = ForwardInput(
            input_ids=batch.input_ids,
            metadata=batch.metadata,
            plan=step.plan,
            logit_rows=batch.logit_rows,
            num_logits_per_dp_rank=step.num_logits,
        )
        return self.runner.forward(inputs, split=_halves(inputs, cut, step) if case.split else None)

    def _batch(self, case: ForwardCase) -> SyntheticBatch:
        chance = torch.Generator().manual_seed(self.runner.parallel.dp_rank)
        ids = torch.randint(2, self.runner.model_config.vocab_size, (case.num_tokens,), generator=chance)
        return (decode_batch if case.decode else prefill_batch)(case.num_tokens, ids, self._pool)

    def _step(self, batch: SyntheticBatch, cut: int) -> Step:
        header = StepHeader(
            num_decode=batch.num_decode,
            num_extend=sum(batch.chunk_lengths),
            num_logits=len(batch.logit_rows),
            first_tokens=cut,
            first_logits=int((batch.logit_rows < cut).sum()),
        )
        return resolve_step([header] * self.runner.parallel.world_size, self._rules)


def _halves(inputs: ForwardInput, cut: int, step: Step) -> ForwardSplit:
    assert step.split is not None, "every rank has two tokens or more"
    first, second = inputs.split(cut, step.split.plans, step.split.num_logits)
    return ForwardSplit(first=first, second=second, extends=step.extends)
