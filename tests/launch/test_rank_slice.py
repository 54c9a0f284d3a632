"""benchmarks/rank_slice.py without a GPU: its rank does what a rank of a real EP group does, and it says all it knows."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatch_jobs import HIDDEN, DispatchCase, DispatchResult, case_inputs, dispatch_job
from rank_pool import RankPool
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels.grouped_backends import BACKENDS, Name
from moesaic.moe.communication import Communications
from moesaic.moe.device_experts import make_expert_runner
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.moe.experts import ExpertRunner, ExpertWeights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rank_slice
from slice_cases import DEEPSEEK_V3, PAGE_SIZE, TINY, Case, all_cases, tiny_cases
from slice_dispatcher import LoopbackDispatcher, LoopbackGroup
from slice_report import PUBLISHED, case_report
from slice_roofline import GROUPS, H200
from slice_run import RankSlice, SliceStep
from slice_traffic import RankPlace
from slice_wire import HostWire

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("mode", "runner"),
    [(DispatchMode.NORMAL, "triton"), (DispatchMode.NORMAL, "deep_gemm"), (DispatchMode.LOW_LATENCY, "triton")],
    ids=["normal", "normal, aligned", "low latency"],
)
def test_the_rank_has_the_rows_and_products_of_a_rank_of_a_real_ep_group(
    mode: DispatchMode, runner: Name, rank_pool: RankPool
) -> None:
    """Real dispatchers over gloo say what each of two ranks gets for the same choices; the loopback one delivers the same."""
    alignment = BACKENDS[runner].alignment if mode is DispatchMode.NORMAL else 1
    case = DispatchCase(backend="torch", mode=mode, world=2, counts=(5, 5), ep=2, alignment=alignment)
    chosen = torch.cat([case_inputs(case, source)[1].ids for source in range(case.world)]).flatten()
    rows = chosen.bincount(minlength=case.num_experts).view(case.world, -1).tolist()
    results: list[DispatchResult] = [each[0] for each in rank_pool.run(2, dispatch_job, [case])]
    place = RankPlace(ep_size=2, num_slots=case.num_experts, num_experts=case.num_experts, topk=case.topk)
    for rank, real in enumerate(results):
        group = LoopbackGroup(
            place=place,
            wire=HostWire(),
            counts=lambda tokens, pattern, rank=rank: rows[rank],
            seconds=lambda direction, mode, tokens: 0.0,
            device=CPU,
            runner=runner,
        )
        dispatcher, experts = LoopbackDispatcher(group, 0, Communications()), _runner(place.num_local)
        hidden, topk = case_inputs(case, rank)
        plan = DispatchPlan(mode=mode, num_tokens_per_rank=case.counts)
        received = dispatcher.dispatch_b(dispatcher.dispatch_a(hidden, topk, plan))
        assert tuple(received.rows.hidden.shape) == real.rows_shape
        assert torch.as_tensor(received.rows.counts).tolist() == real.counts
        with FlopCounterMode(display=False) as counter:
            outputs = experts.run(received.rows)
        computed = math.prod(real.rows_shape[:-1])  # torch's masked product computes the whole block
        assert counter.get_total_flops() == 2 * computed * 3 * HIDDEN * experts.inner_size
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


def test_words_that_no_case_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rank_slice.main(["--only", "decode EP7 "])
    assert "no case has 'decode EP7 ' in its name" in capsys.readouterr().err


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


class LoggedMessage:
    """A message that notes when it was waited for."""

    def __init__(self, message: Any, number: int, log: list[str]) -> None:
        self._message, self._number, self._log = message, number, log

    def wait(self) -> None:
        self._log.append(f"{self._number} waited for")
        self._message.wait()

    def wait_on_host(self) -> None:
        self._message.wait_on_host()

    def when_done(self, callback: Any) -> None:
        self._message.when_done(callback)

    def value(self) -> Any:
        return self._message.value()


class LoggingWire(HostWire):
    """The real wire; `log` says what was sent and waited for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self._sent = 0

    def send(self, transfer: Any, seconds: float) -> Any:
        self.log.append(f"{self._sent} sent")
        self._sent += 1
        return LoggedMessage(super().send(transfer, seconds), self._sent - 1, self.log)


@pytest.mark.parametrize("case", tiny_cases()[1:], ids=lambda case: case.phase)
def test_communication_is_waited_for_at_once_in_a_straight_step_and_under_the_other_half_in_a_split_one(case: Case) -> None:
    wire = LoggingWire()
    rank = RankSlice(TINY, case, device=CPU, dtype=torch.float32, wire=wire)
    step = SliceStep(TINY, case, rank.group, dtype=torch.float32)
    rank.model.forward(step.inputs, step.pool)
    messages = 2 * len(TINY.sparse_layers)
    assert wire.log == [f"{number} {what}" for number in range(messages) for what in ("sent", "waited for")]
    wire.log.clear()
    rank.model.forward(step.inputs, step.pool, split=step.split)
    assert len(wire.log) == 4 * messages
    at = {event: place for place, event in enumerate(wire.log)}
    under_others = [number for number in range(messages, 3 * messages) if at[f"{number} waited for"] > at[f"{number} sent"] + 1]
    assert len(under_others) > messages, "most messages travel while the other half goes on"
