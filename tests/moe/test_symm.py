"""Ranks that write each other's memory get what collectives give them: over real processes, the kernels in the interpreter."""

from __future__ import annotations

import interpreter
import pytest
import torch
from rank_pool import RankPool
from symm_jobs import absent_job, parity_job, two_batches_job

from moesaic.kernels.peer_exchange import PeerLayout
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.symm_windows import NoPeerMemoryError, symmetric_windows

interpreted = pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: the interpreter is off")
LOW, NORMAL = DispatchMode.LOW_LATENCY, DispatchMode.NORMAL


@interpreted
def test_each_rank_gets_what_collectives_give_in_both_modes_idle_or_not(rank_pool: RankPool) -> None:
    steps = [(LOW, (3, 1)), (LOW, (0, 2)), (NORMAL, (5, 0)), (LOW, (0, 0)), (LOW, (1, 4))]
    for rank, outputs in enumerate(rank_pool.run(2, parity_job, 2, steps)):
        for (mode, counts), (by_memory, by_collectives) in zip(steps, outputs, strict=True):
            assert len(by_memory) == counts[rank]
            # The FP8 rounding that W8A8 experts do first has been done on the way.
            torch.testing.assert_close(
                by_memory, by_collectives, rtol=1e-4, atol=1e-3, msg=lambda text, mode=mode: f"{mode}: {text}"
            )


@interpreted
def test_two_micro_batches_have_a_window_each(rank_pool: RankPool) -> None:
    for outputs in rank_pool.run(2, two_batches_job, 2, (2, 1)):
        for by_memory, by_collectives in outputs:
            torch.testing.assert_close(by_memory, by_collectives, rtol=1e-4, atol=1e-3)


@interpreted
def test_a_rank_that_does_not_come_is_named_to_the_others(rank_pool: RankPool) -> None:
    told, _ = rank_pool.run(2, absent_job, 2)
    assert told == "rank 1 did not come to the dispatch in time: its own log says why it stopped or fell behind"


def test_without_cuda_the_backend_is_refused() -> None:
    layout = PeerLayout(num_ranks=1, num_local=1, max_tokens=1, topk=1, hidden=128)
    with pytest.raises(NoPeerMemoryError, match="the device is cpu, and only CUDA devices share memory; use torch"):
        symmetric_windows(layout, 0, None, "cpu")
