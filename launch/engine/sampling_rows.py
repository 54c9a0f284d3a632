"""The sampling parameters of a step's sampled rows, gathered from the sequence table without visiting each sequence.

Gathered when the step is launched; the tokens of the step before may not be known then. All but penalties is independent of them.
Penalties count tokens, so they are made up when the rows are sampled, in the order of the steps, by whoever samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moesaic.kernels.gpu import upload
from moesaic.kernels.sampling import MIN_TEMPERATURE
from moesaic.launch.engine.messages import SamplingParams
from moesaic.launch.engine.penalties import Penalties, TokenHistory
from moesaic.launch.engine.sampler import SamplingBatch
from moesaic.launch.engine.sequence import Int64Array, Sequence, SequenceTable

GREEDY = SamplingBatch.make(temperature=[], top_p=[], top_k=[], min_p=[], seed=[], position=[])
"""For rows that are all greedy, however many: nothing in it is read per row."""


@dataclass(frozen=True, kw_only=True)
class PenalisedRow:
    """A row whose penalties depend on the tokens that its request has had. Only the sampling side touches `history`."""

    row: int
    history: TokenHistory
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """`batch`: how to sample, but for penalties."""

    batch: SamplingBatch
    penalised: tuple[PenalisedRow, ...] = ()

    def with_penalties(self, num_rows: int, device: torch.device) -> SamplingBatch:
        """How to sample now: the tokens of all steps before are in the histories."""
        if not self.penalised:
            return self.batch
        frequency, presence, repetition = [0.0] * num_rows, [0.0] * num_rows, [1.0] * num_rows
        for each in self.penalised:
            frequency[each.row], presence[each.row] = each.sampling.frequency_penalty, each.sampling.presence_penalty
            repetition[each.row] = each.sampling.repetition_penalty
        penalties = Penalties.make(
            frequency=frequency,
            presence=presence,
            repetition=repetition,
            histories=[(each.row, each.history) for each in self.penalised],
            device=device,
        )
        return replace(self.batch, penalties=penalties)

    def record(self, tokens: Int64Array) -> None:
        """Count the tokens int64 [S] that were sampled."""
        for each in self.penalised:
            each.history.append(int(tokens[each.row]))


def sampling_rows(slots: Int64Array, positions: Int64Array, table: SequenceTable, device: torch.device) -> SamplingRows:
    """Parameters of the rows of `slots`, whose tokens get these positions, int64 [S] each.

    Only sequences with penalties or a pending minimum length cost Python time.
    """
    temperature, top_k = table.temperature[slots], table.top_k[slots]
    random = (temperature >= MIN_TEMPERATURE) & (top_k != 1)
    penalised = _penalised(slots, table)
    short = np.flatnonzero(positions < table.min_tokens[slots])
    if not len(short) and not penalised and not random.any():
        return SamplingRows(batch=GREEDY)
    top_p, min_p = table.top_p[slots], table.min_p[slots]
    nucleus = random & ((top_p < 1) | (top_k > 0))

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return upload(torch.from_numpy(array), device)

    batch = SamplingBatch(
        temperature=tensor(temperature),
        top_p=tensor(top_p),
        min_p=tensor(min_p),
        top_k=tensor(top_k),
        seed=tensor(table.seed[slots]),
        position=tensor(positions),
        plain_rows=tensor(np.flatnonzero(random & ~nucleus)),
        nucleus_rows=tensor(np.flatnonzero(nucleus)),
        all_greedy=not random.any(),
        needs_min_p=bool((min_p[random] > 0).any()),
        banned=_banned([(int(row), table.sequence(int(slots[row]))) for row in short], device),
    )
    return SamplingRows(batch=batch, penalised=penalised)


def _penalised(slots: Int64Array, table: SequenceTable) -> tuple[PenalisedRow, ...]:
    rows = []
    for row in np.flatnonzero(table.needs_history[slots]).tolist():
        sequence = table.sequence(int(slots[row]))
        assert sequence.history is not None, "a sequence with penalties has a history"
        rows.append(PenalisedRow(row=row, history=sequence.history, sampling=sequence.request.sampling))
    return tuple(rows)


def _banned(short: list[tuple[int, Sequence]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, token ids) of the stop ids that sequences below their minimum length must not choose yet."""
    pairs = [(row, token) for row, sequence in short for token in sequence.request.sampling.stop_token_ids]
    if not pairs:
        return None
    rows, tokens = upload(torch.tensor(pairs, dtype=torch.int64), device).unbind(1)
    return rows, tokens
