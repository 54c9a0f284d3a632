"""The inputs of captured forwards: tensors at fixed addresses, which every step's own rows are copied into.

All but the token ids are packed on the CPU and go there in one copy, for which nothing waits (device_copies.py says why nothing is
overwritten on its way). The ids are on the device already, as the step before has sampled them.

Rows that a step leaves over are blank: they hold a sequence of one token in the pool's scratch page, and are marked as not valid,
so that they are sent to no expert and counted nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, DecodeBucket
from moesaic.launch.engine.device_copies import ALIGNMENT, pinned
from moesaic.launch.models.forward import ForwardInput
from moesaic.moe.dispatcher import DispatchPlan

WORD = torch.int64
COLUMNS = 5
"""Words of a row beside its page table: id, position, KV slot, length and validity."""


class GraphInputs:
    """For steps of up to `most_rows` rows and page tables of these widths, in pages."""

    def __init__(self, *, most_rows: int, widths: Sequence[int], pool: LatentKVPool, device: torch.device) -> None:
        self._pool = pool
        self._words = torch.zeros(_num_words(most_rows, max(widths)), dtype=WORD, device=device)
        self._logit_rows = torch.arange(most_rows, device=device)

    def view(self, num_rows: int, width: int, plan: DispatchPlan, dp_size: int) -> ForwardInput:
        """The inputs of a forward of `num_rows` decode rows alone. Those of other numbers and widths lie in the same memory."""
        rows = _Rows.of(self._words, num_rows, width)
        bucket = DecodeBucket(rows=None, page_table=rows.table, seq_lens=rows.seq_lens, page_size=self._pool.page_size)
        return ForwardInput(
            input_ids=rows.ids,
            metadata=AttentionMetadata(
                positions=rows.positions, slots=rows.slots, num_decode=num_rows, buckets=(bucket,), extends=()
            ),
            plan=plan,
            logit_rows=self._logit_rows[:num_rows],
            num_logits_per_dp_rank=(num_rows,) * dp_size,
            valid=rows.valid,
        )

    def load(self, inputs: ForwardInput, num_rows: int, width: int) -> None:
        """Copy a step's rows in, and blank what is left of `num_rows`. Waits for nothing.

        `inputs` are on the CPU, but for their ids, which may be on the device.
        """
        count = len(inputs.input_ids)
        self._send(inputs.metadata if count else None, count, num_rows, width)
        if count:
            self._words[:count].copy_(inputs.input_ids, non_blocking=True)

    def blank(self, num_rows: int, width: int) -> None:
        """As `load` of a step without rows."""
        self._send(None, 0, num_rows, width)

    def _send(self, metadata: AttentionMetadata | None, count: int, num_rows: int, width: int) -> None:
        num_words = _num_words(num_rows, width)
        host = pinned(num_words, WORD, self._words.device).zero_()
        rows = _Rows.of(host, num_rows, width)
        rows.slots[count:] = self._pool.scratch_slot
        rows.seq_lens[count:] = 1
        rows.table[count:, 0] = self._pool.scratch_page
        if metadata is not None:
            (bucket,) = metadata.buckets
            assert bucket.rows is None, "a step that replays a graph has its rows in one bucket, in their order"
            assert not metadata.positions.is_cuda, "rows are packed on the CPU"
            rows.positions[:count] = metadata.positions
            rows.slots[:count] = metadata.slots
            rows.seq_lens[:count] = bucket.seq_lens
            rows.table[:count, : bucket.page_table.shape[1]] = bucket.page_table
            rows.valid[:count] = True
        self._words[:num_words].copy_(host, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Where in a run of words each input lies: int64 [B], valid bool [B], table int64 [B, width]."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    valid: Tensor
    table: Tensor

    @staticmethod
    def of(words: Tensor, num_rows: int, width: int) -> _Rows:
        stride = _column_words(num_rows)
        ids, positions, slots, seq_lens, flags = (words[column * stride :][:num_rows] for column in range(COLUMNS))
        table = words[COLUMNS * stride :][: num_rows * width].view(num_rows, width)
        valid = flags.view(torch.bool)[:num_rows]
        return _Rows(ids=ids, positions=positions, slots=slots, seq_lens=seq_lens, valid=valid, table=table)


def _column_words(num_rows: int) -> int:
    """So that each begins where the kernels like it."""
    step = ALIGNMENT // WORD.itemsize
    return -(-num_rows // step) * step


def _num_words(num_rows: int, width: int) -> int:
    return COLUMNS * _column_words(num_rows) + num_rows * width
