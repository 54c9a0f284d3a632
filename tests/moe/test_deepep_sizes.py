"""DeepEP's limits and sizes, at real deployments' numbers, and the same as the library's own hints say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import deepep_standin
import pytest

from moesaic.moe.deepep_config import (
    ChunkSizes,
    DeepEPSettings,
    ExchangeShape,
    Generation,
    recommended_combine,
    recommended_dispatch,
)
from moesaic.moe.deepep_library import DeepEPError, explain, explained, load, why_missing
from moesaic.moe.deepep_limits import violations
from moesaic.moe.deepep_memory import low_latency_bytes, plan_buffers, qp_depth

DECODE_72 = ExchangeShape(num_ranks=72, ranks_per_node=8, num_slots=288, hidden_size=7168, topk=8)
PREFILL_32 = replace(DECODE_72, num_ranks=32)
NODE_8 = replace(DECODE_72, num_ranks=8)
LOW, NORMAL = DeepEPSettings(mode="low_latency"), DeepEPSettings(mode="normal")


@pytest.fixture
def without_deep_ep(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process has not imported the stand-in, does not find it, and has forgotten it afterwards."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != deepep_standin.STANDINS])
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "deep_ep"]:
        del sys.modules[name]


def _reasons(settings: DeepEPSettings, shape: ExchangeShape, generation: Generation = "deepep") -> str:
    return " | ".join(f"{each.reason}: {each.remedy}" for each in violations(generation, settings, shape))


@pytest.mark.parametrize(
    ("settings", "shape"), [(LOW, DECODE_72), (NORMAL, PREFILL_32), (DeepEPSettings(), NODE_8), (DeepEPSettings(), PREFILL_32)]
)
@pytest.mark.parametrize("generation", ["deepep", "deepep_v2"])
def test_published_deployments_are_legal(generation: Generation, settings: DeepEPSettings, shape: ExchangeShape) -> None:
    assert not _reasons(settings, shape, generation)


@pytest.mark.parametrize(
    ("settings", "shape", "wanted"),
    [
        ({"mode": "auto"}, {"num_ranks": 72}, "72 ranks in normal mode, which is built for 16, 24, 32, 48"),
        ({}, {"num_ranks": 6, "ranks_per_node": 6}, "6 ranks within a node: --tp-size 2, 4 or 8"),
        ({}, {"num_ranks": 8, "ranks_per_node": 4}, "4 ranks on each of 2 nodes; between nodes it wants 8 on each"),
        ({}, {"num_slots": 290}, "290 expert slots are no multiple of 8 ranks: --ep-num-redundant-experts 6 more"),
        ({}, {"hidden_size": 7104}, "hidden size 7104 in low-latency mode, which is built for 2048, 2560"),
        ({"mode": "normal", "fp8": True}, {"hidden_size": 7104}, "hidden size 7104 is no multiple of 128: --quantization none"),
        ({}, {"topk": 12}, "top-12 in low-latency mode, which takes up to 11: --deepep-mode normal"),
        ({"max_tokens_per_rank": 1028}, {}, "1028 tokens per rank in low-latency mode; 128 are usual, 1024 the most"),
        ({"max_tokens_per_rank": 7}, {"num_ranks": 2, "ranks_per_node": 2}, "7 tokens per rank x 2 ranks are no multiple of 4"),
        ({"max_tokens_per_rank": 1024}, {"num_slots": 1024}, "need a low-latency buffer of"),
    ],
)
def test_what_the_first_generation_does_not_support_is_named_with_its_remedy(
    settings: dict[str, Any], shape: dict[str, Any], wanted: str
) -> None:
    assert wanted in _reasons(replace(DeepEPSettings(), **settings), replace(NODE_8, **shape))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ({"num_ranks": 2048, "num_slots": 2048}, "2048 ranks, of at most 1024"),
        ({"num_slots": 4096}, "4096 expert slots, of at most 2048"),
        ({"num_ranks": 1, "ranks_per_node": 1}, "a single rank sends nothing"),
        ({"topk": 33}, "33 choices per token (top-k), of at most 32"),
    ],
)
def test_what_the_second_generation_does_not_support(shape: dict[str, Any], wanted: str) -> None:
    assert wanted in _reasons(DeepEPSettings(), replace(NODE_8, **shape), "deepep_v2")


def test_low_latency_needs_a_queue_pair_per_local_expert_and_a_depth_for_its_tokens() -> None:
    plan = plan_buffers("deepep", LOW, DECODE_72)
    assert (plan.num_nvl_bytes, plan.num_qps_per_rank, plan.qp_depth) == (0, 4, 1024)
    assert 2.1e9 < plan.num_rdma_bytes < 2.2e9
    assert [qp_depth(tokens) for tokens in (128, 511, 512, 1024)] == [1024, 1024, 2048, 4096]
    assert all(qp_depth(tokens) >= 2 * (tokens + 1) for tokens in range(1, 1025))
    assert "4 QPs per rank of depth 1024 (NVSHMEM_QP_DEPTH)" in plan.describe()


def test_one_buffer_for_both_modes_has_room_for_either() -> None:
    both = plan_buffers("deepep", DeepEPSettings(), PREFILL_32)
    low, normal = (plan_buffers("deepep", settings, PREFILL_32) for settings in (LOW, NORMAL))
    assert both.num_rdma_bytes == max(low.num_rdma_bytes, normal.num_rdma_bytes)
    assert both.num_qps_per_rank == max(9, 20)
    assert plan_buffers("deepep", NORMAL, NODE_8).num_rdma_bytes == 0


@pytest.mark.usefixtures("without_deep_ep")
def test_sizes_are_those_of_the_librarys_own_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's, which were written apart from ours after the library's host code."""
    monkeypatch.syspath_prepend(deepep_standin.STANDINS)
    library = load("deepep")
    for shape, tokens in ((DECODE_72, 128), (PREFILL_32, 256), (NODE_8, 64)):
        hint = library.Buffer.get_low_latency_rdma_size_hint(tokens, shape.hidden_size, shape.num_ranks, shape.num_slots)
        assert low_latency_bytes(tokens, shape) == hint
    for sizes in (recommended_dispatch(32), recommended_combine(8), ChunkSizes(num_sms=24, num_max_rdma_chunked_recv_tokens=100)):
        config = library.Config(**{name: getattr(sizes, name) for name in ChunkSizes.__dataclass_fields__})
        for ranks in (8, 32):
            assert sizes.nvl_bytes(14336, ranks) == config.get_nvl_buffer_size_hint(14336, ranks)
            assert sizes.rdma_bytes(14336, ranks) == config.get_rdma_buffer_size_hint(14336, ranks)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_sms": 21},
        {"num_max_nvl_chunked_send_tokens": 256},
        {"num_max_rdma_chunked_send_tokens": 20, "num_max_rdma_chunked_recv_tokens": 20},
    ],
)
def test_chunks_that_the_library_would_refuse_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_sms 21|recv_tokens"):
        ChunkSizes(**sizes)


@pytest.mark.usefixtures("without_deep_ep")
def test_a_missing_or_other_generation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = why_missing("deepep")
    assert reason is not None and "No module named 'deep_ep'" in reason and "./install.sh" in reason
    monkeypatch.syspath_prepend(deepep_standin.STANDINS)
    assert why_missing("deepep") is None and why_missing("deepep_v2") is None
    library = load("deepep")
    monkeypatch.delattr(library, "ElasticBuffer")
    with pytest.raises(DeepEPError, match=r"deep_ep \(version 2.1.0\) has no ElasticBuffer.*use --moe-a2a-backend deepep, or"):
        load("deepep_v2")
    monkeypatch.delattr(library, "Buffer")
    assert "has no Buffer" in str(why_missing("deepep"))


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("Assertion exception (buffer.hpp:264): nvshmem_rank == nvshmem::init(root_unique_id, ...)", "NVSHMEM could not start"),
        ("CUDA runtime exception (x:1): 201 (cudaErrorDeviceUninitialized, invalid device context)", "--ipc=host"),
        ("NCCL exception (nccl.cu:12): 3 (unhandled system error)", "NCCL >= 2.30.4"),
        ("CUDA runtime exception (x:1): 2 (cudaErrorMemoryAllocation, out of memory)", "lower --mem-fraction-static"),
        ("CUDA error: unspecified launch failure", "names src_rank"),
    ],
)
def test_opaque_errors_say_what_they_mean_and_keep_the_librarys_words(words: str, meaning: str) -> None:
    assert meaning in explain(words)
    with pytest.raises(DeepEPError) as caught, explained("start"):
        raise RuntimeError(words)
    assert meaning in str(caught.value) and words in str(caught.value)
    assert str(caught.value.__cause__) == words
