"""A plan as tensors: the rows of one forward, decode rows first, then the chunks one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.attention.metadata import AttentionMetadata, ExtendSequence, decode_buckets
from moesaic.kernels.gpu import upload
from moesaic.launch.engine.plan import Plan
from moesaic.launch.engine.sequence import Int64Array, SequenceTable


@dataclass(frozen=True, kw_only=True)
class Batch:
    """input_ids int64 [T], those of decode rows blank: their tokens may not be known yet (step_job.py fills them in).

    logit_rows int64: the sampled rows in the plan's order, then the rows of prompt logprobs; `host_logit_rows`: the same on the
    CPU, which can be split by value without a wait for the device.
    """

    input_ids: Tensor
    metadata: AttentionMetadata
    logit_rows: Tensor
    host_logit_rows: Tensor
    num_sampled: int


def build_batch(plan: Plan, table: SequenceTable, page_size: int, device: torch.device, *, one_bucket: bool = False) -> Batch:
    """Rows, positions and KV slots of a plan that is not launched yet. Works on arrays; only chunks are visited one by one.

    one_bucket: the decode rows are to stay together, in their order.
    """
    slots = plan.decode_slots
    seq_lens = table.num_tokens[slots]
    decode_positions = seq_lens - 1
    decode_pages = table.pages[slots, decode_positions // page_size].astype(np.int64)
    ids = [np.zeros(len(slots), dtype=np.int64)]
    positions = [decode_positions]
    kv_slots = [decode_pages * page_size + decode_positions % page_size]
    extends, sampled, prompt_rows = [], [np.arange(len(slots))], []
    start = len(slots)
    for chunk in plan.chunks:
        sequence = chunk.sequence
        at = np.arange(chunk.start, chunk.start + chunk.length)
        row = table.page_row(sequence.slot).astype(np.int64)
        ids.append(sequence.tokens[chunk.start : chunk.start + chunk.length].astype(np.int64))
        positions.append(at)
        kv_slots.append(row[at // page_size] * page_size + at % page_size)
        last_page = -(-(chunk.start + chunk.length) // page_size)
        extends.append(
            ExtendSequence(
                start=start,
                length=chunk.length,
                prefix_len=chunk.start,
                pages=upload(torch.from_numpy(row[:last_page]), device),
            )
        )
        if chunk.completes:
            sampled.append(np.array([start + chunk.length - 1]))
        wanted = chunk.prompt_rows()
        prompt_rows.append(np.arange(wanted.start, wanted.stop) - chunk.start + start)
        start += chunk.length
    sampled_rows = np.concatenate(sampled)
    logit_rows = torch.from_numpy(np.concatenate([sampled_rows, *prompt_rows]))
    return Batch(
        input_ids=_tensor(ids, device),
        metadata=AttentionMetadata(
            positions=_tensor(positions, device),
            slots=_tensor(kv_slots, device),
            num_decode=len(slots),
            buckets=decode_buckets(table.pages[slots], seq_lens, page_size, device, one=one_bucket),
            extends=tuple(extends),
        ),
        logit_rows=upload(logit_rows, device),
        host_logit_rows=logit_rows,
        num_sampled=len(sampled_rows),
    )


def _tensor(parts: list[Int64Array], device: torch.device) -> Tensor:
    return upload(torch.from_numpy(np.concatenate(parts)), device)
