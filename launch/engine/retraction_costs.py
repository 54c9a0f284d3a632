"""Measures, when a rank starts, what keeping a retracted sequence's KV costs and what computing it again would.

All ranks measure in lockstep and the slowest one counts, so that all come to the same figures. It takes a few steps and leaves
nothing behind but KV rows in pages that nobody holds.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from moesaic.attention.host_pool import HostKVPool
from moesaic.launch.engine.batch import forward_input
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.retraction import RetractionCosts
from moesaic.launch.engine.scheduler import SchedulerConfig
from moesaic.launch.engine.step import SplitThresholds, StepHeader, StepRules, resolve_step
from moesaic.launch.engine.synthetic_batch import PoolShape, SyntheticBatch, decode_batch, prefill_batch

REPEATS = 2
MOST_PAGES = 64


def measure_costs(runner: ModelRunner, host: HostKVPool, rules: StepRules, sizes: SchedulerConfig) -> RetractionCosts:
    """`rules` and `sizes` as for the real steps. Nothing is under way. Collective."""
    num_pages = min(MOST_PAGES, sizes.num_pages, host.num_pages)
    batch = _chunk(runner, sizes)
    # The first of each pays for what is done once.
    copies = [_copy_seconds(host, num_pages) for _ in range(1 + REPEATS)][1:]
    steps = [_step_seconds(runner, batch, rules) for _ in range(1 + REPEATS)][1:]
    slowest = torch.tensor([min(copies) / num_pages, min(steps) / len(batch.input_ids)], dtype=torch.float64)
    if runner.parallel.world_group is not None:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=runner.parallel.world_group)
    copy_s, compute_s = slowest.tolist()
    return RetractionCosts(copy_s_per_page=copy_s, recompute_s_per_token=compute_s)


def _chunk(runner: ModelRunner, sizes: SchedulerConfig) -> SyntheticBatch:
    """As many prompt tokens as a step takes."""
    num_tokens = max(1, min(sizes.chunk_tokens, sizes.num_pages * sizes.page_size))
    chance = torch.Generator().manual_seed(runner.parallel.dp_rank)
    ids = torch.randint(runner.model_config.vocab_size, (num_tokens,), generator=chance).to(runner.config.device)
    pool = PoolShape(num_pages=sizes.num_pages, page_size=sizes.page_size, context_length=sizes.context_length)
    return decode_batch(1, ids, pool) if num_tokens == 1 else prefill_batch(num_tokens, ids, pool)


def _step_seconds(runner: ModelRunner, batch: SyntheticBatch, rules: StepRules) -> float:
    """A step in which every DP rank has a batch like this one; all begin together. Collective."""
    header = StepHeader(num_decode=batch.num_decode, num_extend=sum(batch.chunk_lengths), num_logits=len(batch.logit_rows))
    step = resolve_step([header] * runner.parallel.world_size, replace(rules, split_from=SplitThresholds()))
    # The metadata is new, as in every real step: it keeps what the first layer derives from it.
    inputs = forward_input(replace(batch, metadata=replace(batch.metadata)), step)
    if runner.parallel.world_group is not None:
        dist.all_reduce(torch.zeros(1), group=runner.parallel.world_group)
    begun = time.perf_counter()
    runner.forward(inputs)
    if inputs.input_ids.is_cuda:
        torch.cuda.synchronize()
    runner.verify()
    return time.perf_counter() - begun


def _copy_seconds(host: HostKVPool, num_pages: int) -> float:
    """Pages there and back."""
    pages = np.arange(num_pages, dtype=np.int32)
    begun = time.perf_counter()
    kept = host.store(pages)
    host.load(kept, pages)
    if host.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    host.free(kept)
    return seconds
