"""From which step size on two-batch overlap is faster: told by rank 0's profile, or measured by all ranks when they start.

For each forward mode and a row of sizes the same synthetic step runs straight and split, in turn, on all ranks in lockstep, with as
many tokens on every DP rank. A time is that of the slowest rank, so all ranks come to the same thresholds. It takes seconds: a size
gets about SECONDS_PER_SIZE, or 8 steps if those take longer. Nothing is left behind but KV rows in pages that nobody holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date

import torch
import torch.distributed as dist

from moesaic.launch.engine.batch import forward_input
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.rank_spec import SPLIT_MODES, ThresholdSource
from moesaic.launch.engine.scheduler import SchedulerConfig
from moesaic.launch.engine.step import SplitThresholds, Step, StepHeader, StepRules, resolve_step
from moesaic.launch.engine.synthetic_batch import PoolShape, SyntheticBatch, decode_batch, prefill_batch
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.overlap.calibration import Measurement, Profile, counts_to_measure, summarise, write_profile
from moesaic.overlap.split import split_row

SECONDS_PER_SIZE = 0.5
MIN_REPEATS, MAX_REPEATS = 3, 9

Progress = Callable[[int, int], None]
"""Called with (sizes measured, sizes in all)."""


def settle_profile(
    source: ThresholdSource, calibration: Calibration, on_progress: Progress
) -> tuple[SplitThresholds, Profile | None]:
    """The thresholds, equal on all ranks, and on rank 0 the profile that they follow from. Collective.

    Measures unless rank 0 has a profile. Raises OSError naming the file when rank 0 can't write what was measured.
    """
    thresholds = calibration.from_rank_0(None if source.profile is None else _thresholds(source.profile))
    if thresholds is not None:
        return thresholds, source.profile
    modes = calibration.measure(on_progress)
    profile = Profile(hardware=source.hardware, date=date.today().isoformat(), layout=source.layout, modes=modes)
    if not calibration.is_rank_0:
        return _thresholds(profile), None
    if source.save_to is not None:
        write_profile(profile, source.save_to)
    return _thresholds(profile), profile


def _thresholds(profile: Profile) -> SplitThresholds:
    return SplitThresholds(**profile.thresholds())


class Calibration:
    """One rank's part in the measurement. `rules` as for the real steps; of `sizes`, what bounds a step and the pool."""

    def __init__(self, runner: ModelRunner, rules: StepRules, sizes: SchedulerConfig) -> None:
        self._runner = runner
        self._parallel = runner.parallel
        self._rules = replace(rules, split_from=SplitThresholds(prefill=2, decode=2))
        self._most = {"prefill": sizes.chunk_tokens, "decode": sizes.max_running}
        self._pool = PoolShape(num_pages=sizes.num_pages, page_size=sizes.page_size, context_length=sizes.context_length)
        self._device = torch.device(runner.config.device)

    @property
    def is_rank_0(self) -> bool:
        return self._parallel.rank == 0

    def from_rank_0(self, thresholds: SplitThresholds | None) -> SplitThresholds | None:
        """What rank 0 calls this with. Collective."""
        word = torch.zeros(3, dtype=torch.int64)
        if thresholds is not None:
            word = torch.tensor([1, thresholds.prefill or 0, thresholds.decode or 0])
        if self._parallel.world_group is not None:
            dist.broadcast(word, src=0, group=self._parallel.world_group)
        known, prefill, decode = word.tolist()
        return SplitThresholds(prefill=prefill or None, decode=decode or None) if known else None

    def measure(self, on_progress: Progress) -> dict[str, tuple[Measurement, ...]]:
        """Measurements of every forward mode, by size, equal on all ranks. Collective."""
        sizes = [(mode, count) for mode in SPLIT_MODES for count in counts_to_measure(self._most[mode])]
        measured: dict[str, list[Measurement]] = {mode: [] for mode in SPLIT_MODES}
        for done, (mode, count) in enumerate(sizes):
            on_progress(done, len(sizes))
            measured[mode].append(self._measure(mode, count))
        on_progress(len(sizes), len(sizes))
        return {mode: tuple(points) for mode, points in measured.items()}

    def timed_step(self, mode: str, num_tokens: int) -> TimedStep:
        """A step of this forward mode with so many tokens on every DP rank."""
        return TimedStep(self._runner, self._batch(mode, num_tokens), self._rules)

    def _measure(self, mode: str, num_tokens: int) -> Measurement:
        """Both ways once to warm up, which also says how often there is time for; then in turn."""
        timed = self.timed_step(mode, num_tokens)
        warm = self._slowest([timed.seconds(split=False), timed.seconds(split=True)])
        repeats = min(max(int(SECONDS_PER_SIZE / sum(warm)), MIN_REPEATS), MAX_REPEATS)
        seconds = self._slowest([timed.seconds(split=split) for _ in range(repeats) for split in (False, True)])
        return summarise(num_tokens, seconds[::2], seconds[1::2])

    def _batch(self, mode: str, num_tokens: int) -> SyntheticBatch:
        """Token ids by chance, so that they go to many experts; the same on the ranks of one DP group."""
        chance = torch.Generator().manual_seed(self._parallel.dp_rank)
        ids = torch.randint(self._runner.model_config.vocab_size, (num_tokens,), generator=chance).to(self._device)
        return decode_batch(num_tokens, ids, self._pool) if mode == "decode" else prefill_batch(num_tokens, ids, self._pool)

    def _slowest(self, seconds: list[float]) -> list[float]:
        """Each time on the rank where it was longest. Collective."""
        longest = torch.tensor(seconds, dtype=torch.float64)
        if self._parallel.world_group is not None:
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self._parallel.world_group)
        times: list[float] = longest.tolist()
        return times


class TimedStep:
    """A step in which every DP rank has a batch like this one, to be run straight or split as real steps' headers would say."""

    def __init__(self, runner: ModelRunner, batch: SyntheticBatch, rules: StepRules) -> None:
        cut = split_row(batch.num_decode, batch.chunk_lengths, rules.distribution_threshold)
        assert cut is not None, "two sequences can be split"
        self._runner = runner
        self._cut = cut
        self._step = _resolve(batch, cut, rules, runner.parallel.world_size)
        self._inputs = forward_input(batch, self._step)

    def seconds(self, *, split: bool) -> float:
        """Cutting the batch is part of a split step. All ranks begin together. Collective."""
        # New, as in every real step: metadata keeps what the first layer derives from it.
        inputs = replace(self._inputs, metadata=replace(self._inputs.metadata))
        group = self._runner.parallel.world_group
        if group is not None:
            dist.all_reduce(torch.zeros(1), group=group)
        begun = time.perf_counter()
        self._runner.forward(inputs, split=self._halves(inputs) if split else None)
        if inputs.input_ids.is_cuda:
            torch.cuda.synchronize()
        self._runner.verify()
        return time.perf_counter() - begun

    def _halves(self, inputs: ForwardInput) -> ForwardSplit:
        agreed = self._step.split
        assert agreed is not None, "every rank has two tokens or more"
        first, second = inputs.split(self._cut, agreed.plans, agreed.num_logits)
        return ForwardSplit(first=first, second=second, extends=self._step.extends)


def _resolve(batch: SyntheticBatch, cut: int, rules: StepRules, world_size: int) -> Step:
    """The step that follows when all ranks say the same."""
    header = StepHeader(
        num_decode=batch.num_decode,
        num_extend=sum(batch.chunk_lengths),
        num_logits=len(batch.logit_rows),
        first_tokens=cut,
        first_logits=int((batch.logit_rows < cut).sum()),
    )
    return resolve_step([header] * world_size, rules)
