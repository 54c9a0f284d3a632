"""benchmarks/rank_slice.py without a GPU: its rank does what a rank of a real EP group does, and its counts are true."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dispatch_jobs import HIDDEN, DispatchCase, DispatchResult, case_inputs, dispatch_job
from rank_pool import RankPool
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic import kernels
from moesaic.kernels.triton.launch import recorded
from moesaic.moe.communication import Communications
from moesaic.moe.device_experts import make_expert_runner
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.moe.experts import ExpertRunner, ExpertWeights
from moesaic.overlap.operations import Operation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rank_slice
import slice_network as network
from slice_cases import DEEPSEEK_V3, PAGE_SIZE, TINY, Case, all_cases, tiny_cases
from slice_dispatcher import LoopbackDispatcher, LoopbackGroup
from slice_model import WeightMaker, build_slice
from slice_report import PUBLISHED, case_report
from slice_roofline import GROUPS, H200, step_work, weight_bytes
from slice_run import RankSlice, SliceStep
from slice_traffic import RankPlace, assign_tokens, busiest_shares, expected_received, expert_counts
from slice_wire import HostWire

MODES = [DispatchMode.NORMAL, DispatchMode.LOW_LATENCY]
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("mode", MODES)
def test_the_rank_has_the_rows_and_products_of_a_rank_of_a_real_ep_group(mode: DispatchMode, rank_pool: RankPool) -> None:
    """Real dispatchers over gloo say what each of two ranks receives; the loopback one then delivers the same."""
    case = DispatchCase(backend="torch", mode=mode, world=2, counts=(5, 5), ep=2)
    results: list[DispatchResult] = [each[0] for each in rank_pool.run(2, dispatch_job, [case])]
    place = RankPlace(ep_size=2, num_slots=case.num_experts, num_experts=case.num_experts, topk=case.topk)
    for rank, real in enumerate(results):
        group = LoopbackGroup(
            place=place,
            wire=HostWire(),
            counts=lambda tokens, pattern, real=real: real.counts,
            seconds=lambda direction, mode, tokens: 0.0,
            device=CPU,
        )
        dispatcher, runner = LoopbackDispatcher(group, 0, Communications()), _runner(place.num_local)
        hidden, topk = case_inputs(case, rank)
        plan = DispatchPlan(mode=mode, num_tokens_per_rank=case.counts)
        received = dispatcher.dispatch_b(dispatcher.dispatch_a(hidden, topk, plan))
        assert tuple(received.rows.hidden.shape) == real.rows_shape
        assert torch.as_tensor(received.rows.counts).tolist() == real.counts
        with FlopCounterMode(display=False) as counter:
            outputs = runner.run(received.rows)
        rows = sum(real.counts) if mode is DispatchMode.NORMAL else received.rows.hidden.shape[0] * received.rows.hidden.shape[1]
        assert counter.get_total_flops() == 2 * rows * 3 * HIDDEN * runner.inner_size
        combined = dispatcher.combine_b(dispatcher.combine_a(outputs, received.handle))
        assert combined.shape == real.output.shape
        assert combined.isfinite().all()


def _runner(num_local: int, inner: int = 128) -> ExpertRunner:
    def values(*shape: int) -> Tensor:
        return torch.randn(*shape).to(torch.float8_e4m3fn)

    weights = ExpertWeights(
        gate_up=values(num_local, 2 * inner, HIDDEN),
        gate_up_scales=torch.ones(num_local, 2, 1),
        down=values(num_local, HIDDEN, inner),
        down_scales=torch.ones(num_local, 1, 1),
    )
    return make_expert_runner(("torch",), weights, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny() -> RankSlice:
    return RankSlice(TINY, tiny_cases()[0], device=CPU, dtype=torch.bfloat16, wire=HostWire())


class OperationCounter:
    """A recorder that says how many floating-point operations each of the model's operations made torch do."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.flops: dict[str, int] = {}
        self._counter = counter
        self._before, self._name = 0, ""

    def enter(self, operation: Operation, micro_batch: int) -> None:
        self._before, self._name = self._counter.get_total_flops(), operation.name

    def leave(self) -> None:
        self.flops[self._name] = self.flops.get(self._name, 0) + self._counter.get_total_flops() - self._before


@pytest.mark.parametrize("balancedness", [1.0, 0.5])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_roofline_counts_the_operations_that_are_done(phase: Any, balancedness: float, tiny: RankSlice) -> None:
    case = Case(phase=phase, ep_size=8, num_slots=24, num_tokens=12, context=64, balancedness=balancedness)
    step = SliceStep(TINY, case, tiny.group, dtype=torch.bfloat16)
    step.become("alone")
    with FlopCounterMode(display=False) as counter:
        counted = OperationCounter(counter)
        tiny.model.forward(step.inputs, step.pool, recorder=counted)
    share = case.share(TINY)
    if phase == "prefill":  # torch's reference computes what causality masks, too
        share = replace(share, num_pairs=12 * 12)
    else:  # and all rows of the masked block
        share = replace(share, num_rows=share.num_local * 8 * 12)
    work = step_work(TINY, share)
    for group in ("attention", "gate", "experts", "shared", "dense", "head"):
        assert sum(counted.flops.get(name, 0) for name in GROUPS[group]) == work[group].num_flops, group


def test_the_roofline_knows_the_bytes_of_every_weight(tiny: RankSlice) -> None:
    weights = tiny.weights
    layers = list(weights.layers)
    counted = weight_bytes(TINY, num_local=3)
    assert counted["attention"] == sum(_bytes(layer.attention) + _bytes(layer.norm) for layer in layers)
    assert counted["dense"] == sum(_bytes(layer.dense) for layer in layers)
    assert counted["gate"] == sum(_bytes(layer.sparse.gate) for layer in layers if layer.sparse is not None)
    assert counted["experts"] == sum(_bytes(layer.sparse.experts) for layer in layers if layer.sparse is not None)
    assert counted["shared"] == sum(_bytes(layer.sparse.shared) for layer in layers if layer.sparse is not None)
    assert counted["head"] == _bytes(weights.embedding) + _bytes(weights.head)


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if not is_dataclass(value):
        return 0
    return sum(_bytes(getattr(value, field.name)) for field in fields(value))


def test_deepseek_v3_has_the_weights_that_it_has() -> None:
    """All 256 experts, one byte each but for embedding, head, kv_b_proj (two) and gates (four): 671e9 parameters."""
    attention, gate, experts, shared, dense, head = (
        weight_bytes(DEEPSEEK_V3, 256)[group] for group in ("attention", "gate", "experts", "shared", "dense", "head")
    )
    kv_up = 61 * 128 * 256 * 512
    assert attention - kv_up + gate / 4 + experts + shared + dense + head / 2 == pytest.approx(671e9, rel=2e-3)


def test_the_busiest_rank_gets_its_rows_and_every_expert_distinct_tokens() -> None:
    place = RankPlace(ep_size=8, num_slots=24, num_experts=16, topk=4)
    assert expert_counts(place, 30, 1.0, 0).tolist() == [40, 40, 40]
    for pattern in range(3):
        counts = expert_counts(place, 30, 0.6, pattern)
        assert counts.sum() == 200
        ids = assign_tokens(counts, 240, 4, pattern)
        assert [(ids == expert).any(axis=1).sum() for expert in range(3)] == [(ids == expert).sum() for expert in range(3)]
        assert [(ids == expert).sum() for expert in range(3)] == counts.tolist()
        assert ((ids >= 0).sum(axis=1) > 0).all()
        assert len(ids) == pytest.approx(expected_received(counts.tolist(), 240), rel=0.1)


def test_the_local_experts_share_the_rows_as_they_share_the_demand() -> None:
    place = RankPlace(ep_size=32, num_slots=288, num_experts=256, topk=8)
    shares, counts = busiest_shares(place, 3), expert_counts(place, 128, 0.7, 3)
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=1 / counts.sum())
    assert shares.max() > 1.2 / place.num_local


def test_a_balancedness_that_no_rank_can_reach_is_refused() -> None:
    place = RankPlace(ep_size=4, num_slots=16, num_experts=16, topk=4)
    with pytest.raises(ValueError, match=r"balancedness 0.2 is not in \[0.25, 1\]"):
        expert_counts(place, 10, 0.2, 0)


def test_communication_takes_the_published_times_and_lies_between_them() -> None:
    def exchange(ep_size: int, num_tokens: int, balancedness: float = 1.0) -> network.Exchange:
        return network.Exchange(
            ep_size=ep_size, num_tokens=num_tokens, hidden=7168, topk=8, topk_groups=4, balancedness=balancedness
        )

    for ep_size, (dispatch_us, combine_us) in network.LOW_LATENCY_US.items():
        assert network.low_latency_s("dispatch", exchange(ep_size, 128)) == pytest.approx(dispatch_us * 1e-6)
        assert network.low_latency_s("combine", exchange(ep_size, 128)) == pytest.approx(combine_us * 1e-6)
    assert 173e-6 < network.low_latency_s("dispatch", exchange(72, 128)) < 192e-6
    assert network.low_latency_s("dispatch", exchange(72, 32)) == network.low_latency_s("dispatch", exchange(72, 128))
    twice = network.low_latency_s("dispatch", exchange(72, 256))
    assert twice == pytest.approx(2 * network.low_latency_s("dispatch", exchange(72, 128)))
    assert network.low_latency_s("dispatch", exchange(72, 256, 0.5)) == pytest.approx(2 * twice)
    assert network.low_latency_s("dispatch", exchange(1, 128)) == network.normal_s("combine", exchange(1, 128)) == 0
    copies = 4 * (1 - 0.75**8)  # nodes of a token, of four
    assert network.normal_s("combine", exchange(32, 4096)) == pytest.approx(4096 * copies * 7168 * 2 / 57e9)
    assert network.normal_s("dispatch", exchange(8, 4096)) == pytest.approx(4096 * 8 * (1 - (7 / 8) ** 8) * 7392 / 153e9)


def test_a_message_is_complete_no_sooner_than_stated_and_not_before_the_one_ahead() -> None:
    wire = HostWire()
    begun = time.perf_counter()
    first, second = wire.send(lambda: 1, 0.02), wire.send(lambda: 2, 0.02)
    second.wait()
    assert time.perf_counter() - begun >= 0.04
    assert (first.value(), second.value()) == (1, 2)


def test_a_reduced_run_reports_every_case_with_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rank_slice.main(["--cpu-tiny", "--quick", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report.keys() == {"title", "machine", "measured", "assumed", "derived", "published", "cases"}
    assert [case["phase"] for case in report["cases"]] == ["prefill", "decode"]
    wanted = case_report(TINY, tiny_cases()[0], H200, None, None).keys()
    for case in report["cases"]:
        assert case.keys() == wanted
        assert case["problem"] is None
        assert case["groups"].keys() == GROUPS.keys()
        assert all(group["ms"] > 0 for group in case["groups"].values())
        assert all(variant["step_ms"] > 0 and variant["tokens_per_s"] > 0 for variant in case["variants"].values())
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(case["name"] in markdown for case in report["cases"])
    assert "Assumed: random weights" in markdown
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ran"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_what_it_would_run_and_what_the_floors_allow(capsys: pytest.CaptureFixture[str]) -> None:
    assert rank_slice.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert "no CUDA device here" in said
    assert "prefill EP32 16384 x 2048" in said
    assert "decode EP72 256 x 2048" in said
    assert "2 cases" in said


def test_what_does_not_fit_is_refused_with_its_bytes() -> None:
    large = next(case for case in all_cases() if case.name == "decode EP72 256 x 4096")
    problem = rank_slice.refusal(DEEPSEEK_V3, large, 80 * 10**9)
    assert problem is not None
    assert "kv 73.7" in problem
    assert "the device has 80.0 GB" in problem
    assert rank_slice.refusal(DEEPSEEK_V3, large, 150 * 10**9) is None


def test_the_published_settings_are_among_the_cases() -> None:
    cases = {case.published: case for case in all_cases() if case.published}
    assert cases.keys() | {"DeepSeek prefill"} == PUBLISHED.keys()
    decode = cases["SGLang decode"]
    assert (decode.place(DEEPSEEK_V3).num_local, decode.num_tokens, decode.context) == (4, 256, 2048)
    assert cases["SGLang prefill 2048"].place(DEEPSEEK_V3).num_local == 9
    assert all(case.context % PAGE_SIZE == 0 for case in cases.values())


class ShapesOnly(LoopbackGroup):
    """A group on torch's meta device: what arrives is drawn on the CPU, and of it only shapes are handed out."""

    def arrivals(self, mode: DispatchMode, num_tokens: int, layer: int) -> Any:
        self.device = CPU
        drawn = super().arrivals(mode, num_tokens, layer)
        self.device = META
        return _without_values(drawn)


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    if not is_dataclass(value):
        return value
    return type(value)(**{field.name: _without_values(getattr(value, field.name)) for field in fields(value)})


class UnsplitStep(SliceStep):
    """Splitting looks at values."""

    def _halves(self, batch: Any) -> Any:
        return None


@pytest.mark.parametrize("words", ["decode EP72 256 x 2048", "decode EP72 256 x 2048 balancedness 0.5", "prefill EP32 4096 x 2048"])
def test_on_a_gpu_every_kernel_takes_what_the_real_sizes_give_it(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: front functions check their arguments and write down the launches instead of making them."""
    for found in pkgutil.iter_modules(kernels.__path__, "moesaic.kernels."):
        if not found.ispkg and found.name != "moesaic.kernels.gpu":
            module = importlib.import_module(found.name)
            if hasattr(module, "uses_triton"):
                monkeypatch.setattr(module, "uses_triton", lambda x: x.device == META)
    case = next(case for case in all_cases() if case.name == words)
    config = replace(DEEPSEEK_V3, num_hidden_layers=4)
    place = case.place(config)
    weights = WeightMaker(config, torch.bfloat16, META, None).make(num_slots=place.num_local, max_positions=8192)
    group = ShapesOnly(
        place=place,
        wire=HostWire(),
        counts=lambda num_tokens, pattern: [],
        seconds=lambda direction, mode, tokens: 0.0,
        device=META,
        runner="triton",
    )
    step = UnsplitStep(config, case, group, dtype=torch.bfloat16)
    with recorded() as launches:
        logits = build_slice(config, weights, group).forward(step.inputs, step.pool)
    assert logits.shape == (case.share(config).num_logits, config.vocab_size)
    names = [launch.kernel.fn.__name__ for launch in launches]
    # Four layers' down, query and output products, three dense layers' two, the shared and the routed experts' two.
    assert names.count("_grouped_kernel") == 4 * 3 + 3 * 2 + 2 + 2
    assert names.count("_split_kernel" if case.phase == "decode" else "_prefill_kernel") == 4
