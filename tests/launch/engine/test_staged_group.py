"""Collectives that pass through host memory give what they give without, and only once somebody waits for them or is told.

On a CPU all tensors are staged, on a GPU those of the device.
"""

from __future__ import annotations

import torch
from rank_pool import RankPool
from staged_jobs import arrival_job, both_ways_job


def test_every_operation_gives_what_gloo_gives(rank_pool: RankPool) -> None:
    for world, dtypes in ((2, (torch.float32, torch.bfloat16, torch.int64)), (4, (torch.float32, torch.uint8))):
        for results in rank_pool.run(world, both_ways_job, world, dtypes):
            for name, staged, plain in results:
                assert torch.equal(staged, plain), name
                assert staged.any(), name


def test_what_is_received_is_there_when_the_waiter_or_a_callback_says_so(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, arrival_job) == [([0.0, 0.0], [1.0, 2.0], [3.0, 4.0])] * 2
