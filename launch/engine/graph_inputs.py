"""The inputs of captured forwards: tensors at fixed addresses, which every step's own rows are copied into.

Rows that a step leaves over are blank: they hold a sequence of one token in the pool's scratch page, and are marked as not valid,
so that they are sent to no expert and counted nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, DecodeBucket
from moesaic.launch.models.forward import ForwardInput
from moesaic.moe.dispatcher import DispatchPlan


class GraphInputs:
    """For steps of up to `most_rows` rows and page tables of these widths, in pages."""

    def __init__(self, *, most_rows: int, widths: Sequence[int], pool: LatentKVPool, device: torch.device) -> None:
        self._pool = pool
        self._ids = torch.zeros(most_rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._slots = torch.full_like(self._ids, pool.scratch_slot)
        self._seq_lens = torch.ones_like(self._ids)
        self._valid = torch.zeros(most_rows, dtype=torch.bool, device=device)
        self._logit_rows = torch.arange(most_rows, device=device)
        shapes = {width: (most_rows, width) for width in widths}
        self._tables = {width: self._ids.new_full(shape, pool.scratch_page) for width, shape in shapes.items()}

    def view(self, num_rows: int, width: int, plan: DispatchPlan, dp_size: int) -> ForwardInput:
        """The first `num_rows` rows as the inputs of a forward of decode rows alone."""
        bucket = DecodeBucket(
            rows=None,
            page_table=self._tables[width][:num_rows],
            seq_lens=self._seq_lens[:num_rows],
            page_size=self._pool.page_size,
        )
        return ForwardInput(
            input_ids=self._ids[:num_rows],
            metadata=AttentionMetadata(
                positions=self._positions[:num_rows],
                slots=self._slots[:num_rows],
                num_decode=num_rows,
                buckets=(bucket,),
                extends=(),
            ),
            plan=plan,
            logit_rows=self._logit_rows[:num_rows],
            num_logits_per_dp_rank=(num_rows,) * dp_size,
            valid=self._valid[:num_rows],
        )

    def load(self, inputs: ForwardInput, num_rows: int, width: int) -> None:
        """Copy a step's rows in, and blank what is left of `num_rows`. Waits for nothing."""
        count, metadata, table = len(inputs.input_ids), inputs.metadata, self._tables[width]
        blank = slice(count, num_rows)
        if count:
            (bucket,) = metadata.buckets
            assert bucket.rows is None, "a step that replays a graph has its rows in one bucket, in their order"
            self._ids[:count].copy_(inputs.input_ids)
            self._positions[:count].copy_(metadata.positions)
            self._slots[:count].copy_(metadata.slots)
            self._seq_lens[:count].copy_(bucket.seq_lens)
            table[:count, : bucket.page_table.shape[1]].copy_(bucket.page_table)
            self._valid[:count].fill_(True)
        self._ids[blank].zero_()
        self._positions[blank].zero_()
        self._slots[blank].fill_(self._pool.scratch_slot)
        self._seq_lens[blank].fill_(1)
        table[blank, 0].fill_(self._pool.scratch_page)
        self._valid[blank].fill_(False)
