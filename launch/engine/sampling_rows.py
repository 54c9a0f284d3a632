"""The sampling parameters of a step's sampled rows, gathered from the sequence table without visiting each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moesaic.launch.engine.penalties import Penalties
from moesaic.launch.engine.sampler import MIN_TEMPERATURE, SamplingBatch
from moesaic.launch.engine.sequence import Int64Array, Sequence, SequenceTable

GREEDY = SamplingBatch.make(temperature=[], top_p=[], top_k=[], min_p=[], seed=[], position=[])
"""For rows that are all greedy, however many: nothing in it is read per row."""


def sampling_batch(slots: Int64Array, table: SequenceTable, device: torch.device) -> SamplingBatch:
    """Parameters of the rows of `slots`; only sequences with penalties or a pending minimum length cost Python time."""
    temperature, top_k = table.temperature[slots], table.top_k[slots]
    random = (temperature >= MIN_TEMPERATURE) & (top_k != 1)
    special = np.flatnonzero(table.needs_history[slots] | (table.num_tokens[slots] < table.min_tokens[slots]))
    if not len(special) and not random.any():
        return GREEDY
    sequences = [(int(row), table.sequence(int(slots[row]))) for row in special]
    top_p, min_p = table.top_p[slots], table.min_p[slots]

    nucleus = random & ((top_p < 1) | (top_k > 0))

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return SamplingBatch(
        temperature=tensor(temperature),
        top_p=tensor(top_p),
        min_p=tensor(min_p),
        top_k=tensor(top_k),
        seed=tensor(table.seed[slots]),
        position=tensor(table.num_tokens[slots]),
        plain_rows=tensor(np.flatnonzero(random & ~nucleus)),
        nucleus_rows=tensor(np.flatnonzero(nucleus)),
        all_greedy=not random.any(),
        needs_min_p=bool((min_p[random] > 0).any()),
        penalties=_penalties(sequences, len(slots), device),
        banned=_banned(sequences, device),
    )


def _penalties(sequences: list[tuple[int, Sequence]], num_rows: int, device: torch.device) -> Penalties | None:
    histories = [(row, sequence.history) for row, sequence in sequences if sequence.history is not None]
    if not histories:
        return None
    frequency, presence, repetition = [0.0] * num_rows, [0.0] * num_rows, [1.0] * num_rows
    for row, sequence in sequences:
        sampling = sequence.request.sampling
        frequency[row], presence[row] = sampling.frequency_penalty, sampling.presence_penalty
        repetition[row] = sampling.repetition_penalty
    return Penalties.make(frequency=frequency, presence=presence, repetition=repetition, histories=histories, device=device)


def _banned(sequences: list[tuple[int, Sequence]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, token ids) of the stop ids that sequences below their minimum length must not choose yet."""
    pairs = [
        (row, token)
        for row, sequence in sequences
        if sequence.num_tokens < sequence.min_tokens
        for token in sequence.request.sampling.stop_token_ids
    ]
    if not pairs:
        return None
    rows, tokens = torch.tensor(pairs, dtype=torch.int64, device=device).unbind(1)
    return rows, tokens
