"""Collectives that pass through host memory give what they give without, and only once somebody waits for them or is told.

On a machine with a GPU its tensors are staged, on others those of the CPU.
"""

from __future__ import annotations

import pytest
import torch
from rank_pool import RankPool
from staged_jobs import arrival_job, both_ways_job

HAS_GPU = torch.cuda.is_available()
on_what_is_staged = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="there is a GPU, whose tensors are staged instead")),
        pytest.param("cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]),
    ],
)


@on_what_is_staged
def test_every_operation_gives_what_gloo_gives(device: str, rank_pool: RankPool) -> None:
    for world, dtypes in ((2, (torch.float32, torch.bfloat16, torch.int64)), (4, (torch.float32, torch.uint8))):
        for results in rank_pool.run(world, both_ways_job, world, dtypes, device):
            for name, staged, plain in results:
                assert torch.equal(staged, plain), name
                assert staged.any(), name


@on_what_is_staged
def test_what_is_received_is_there_when_the_waiter_or_a_callback_says_so(device: str, rank_pool: RankPool) -> None:
    assert rank_pool.run(2, arrival_job, device) == [([0.0, 0.0], [1.0, 2.0], [3.0, 4.0])] * 2
