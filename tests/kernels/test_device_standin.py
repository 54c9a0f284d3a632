"""The stand-in of a CUDA device keeps CUDA's rules; and on it the device's kernels, graphs and benchmarks run as on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import interpreter
import pytest
import torch
from device_standin import DeviceTensor, Seen, installed

from moesaic.kernels.gpu import Download, upload

pytestmark = pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: no stand-in is needed")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = {"HIDDEN": 256, "INTERMEDIATE": 128, "EXPERTS": 32, "HEADS": 3, "LATENT": 128, "KEY": 16, "PAGE": 4}
TOY |= {"VOCABULARY": 300, "NOPE": 16, "VALUE": 8}


@pytest.fixture
def seen() -> Iterator[Seen]:
    with installed() as seen:
        yield seen


def test_tensors_compute_there_and_say_so_in_every_thread(seen: Seen) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.is_cuda and x.device == torch.device("cuda:0") and isinstance(x[:, 1], DeviceTensor)
    x[:, 1] += 10
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(3).to("cuda") @ x.t()))
    thread.start()
    thread.join()
    assert found[0].tolist() == [13.0, 22.0]
    assert torch.isnan(torch.empty(3, device="cuda")).all(), "fresh memory holds rubbish"


def test_host_and_device_tensors_do_not_mix(seen: Seen) -> None:
    x = torch.ones(3, device="cuda")
    assert (x + torch.tensor(2.0)).tolist() == [3.0] * 3, "a host tensor without dimensions is a number"
    with pytest.raises(RuntimeError, match="same device, but found at least two devices, cpu and cuda:0"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="addmm_cuda"):
        torch.ones(2, 2, dtype=torch.int64, device="cuda").mm(torch.ones(2, 2, dtype=torch.int64, device="cuda"))


def test_every_wait_is_seen_with_its_line(seen: Seen) -> None:
    x = torch.arange(4, device="cuda")
    assert not seen.waits
    waiting = [
        lambda: int(x[1]),
        x.tolist,
        x.nonzero,
        lambda: x[x > 1],
        lambda: x[[0, 1]],
        lambda: x.copy_(torch.arange(4)),
        lambda: torch.tensor([1], device="cuda"),
        lambda: torch.from_numpy(torch.ones(2).numpy()).to("cuda", non_blocking=True),
        torch.cuda.synchronize,
    ]
    for number, wait in enumerate(waiting, 1):
        wait()
        assert len(seen.waits) == number
    assert all("test_device_standin.py" in each.place for each in seen.waits)
    mask = x > 1
    x[mask] = 0
    x.index_copy_(0, torch.arange(4, device="cuda"), x + 1)
    torch.where(mask, x, 3)
    assert len(seen.waits) == len(waiting), "these wait for nothing"


def test_upload_and_download_wait_once_at_most(seen: Seen) -> None:
    x = upload(torch.arange(3), torch.device("cuda:0"))
    assert not seen.waits and not upload(torch.empty(0), torch.device("cuda:0")).numel()
    assert [each.tolist() for each in Download(x.device, x, x + 1).result()] == [[0, 1, 2], [1, 2, 3]]
    assert len(seen.waits) == 1


def test_a_copy_without_a_wait_is_not_there_yet(seen: Seen) -> None:
    read = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert torch.isnan(read).all()
    torch.cuda.current_stream().synchronize()
    assert read.tolist() == [1.0, 1.0]
    source = torch.zeros(2).pin_memory()
    source.to("cuda", non_blocking=True)
    source.fill_(5)
    with pytest.raises(AssertionError, match="changed before anything waited"):
        torch.cuda.synchronize()


def test_a_graph_repeats_what_was_captured_and_nothing_else(seen: Seen) -> None:
    x, graph, python = torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        python.append(1)
        y = (x + 1) * 2
    assert torch.isnan(y).all(), "a capture computes nothing"
    for value in (0.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value + 2] * 2
    assert len(python) == 1
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.tolist()


def test_outside_of_it_there_is_no_device() -> None:
    assert not torch.cuda.is_available()
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        torch.zeros(1, device="cuda")


def _shorten_times(monkeypatch: pytest.MonkeyPatch) -> None:
    import h200_timing

    toy = {"COPY_BYTES": 2**16, "PRODUCT_SIZE": 64, "CALLS": 1, "REPLAYS": 1, "FEW": 1, "FLUSH_BYTES": 2**16, "MOST_SLEEP_S": 0.0}
    for name, value in toy.items():
        monkeypatch.setattr(h200_timing, name, value)


@pytest.mark.whole
def test_every_case_of_the_gpu_benchmark_is_made_checked_captured_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: Seen
) -> None:
    """At toy sizes; what the times say means nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import h200
    import h200_attention_cases as attention
    import h200_cases as base
    import h200_expert_cases as experts
    import h200_product_cases as products
    import h200_row_cases as rows
    import h200_step_cases as steps
    from h200_report import Report
    from h200_timing import measure_ceilings

    _shorten_times(monkeypatch)
    for name, value in TOY.items():
        monkeypatch.setattr(base, name, value)
    monkeypatch.setattr(attention, "PROMPT", 16)
    monkeypatch.setattr(steps, "REDUNDANT", 4)
    small = [
        *rows._row_cases(8),
        *products._decode_expert_cases(4, 32)[:2],
        *products._prefill_expert_cases(16)[:2],
        attention._mla(3, 16, False),
        attention._mla(3, 16, True),
        attention._prefill(32),
        attention._merge(4),
        steps._balanced(4, 4),
        steps._embed(4),
        *steps._sampling(4),
        steps._peers(3),
        experts._experts(1, 3, masked=True),
    ]
    report = Report(folder=tmp_path, machine={"device": "stand-in", "torch": torch.__version__}, ceilings=measure_ceilings())
    h200.run_cases(small, report, h200.measure, lambda: True)
    results = report.results
    assert len(results) == len(small)
    for result in results:
        assert result.problem is None and result.time_us is not None, (result.name, result.problem)
        assert not [note for note in result.notes if "refused" in note], result


@pytest.mark.whole
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_rank_slice_runs_from_end_to_end(phase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: Seen) -> None:
    """Its GPU branches, at the tiny sizes: ceilings, wire, captured steps, marks of operations, report."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rank_slice
    import slice_run

    _shorten_times(monkeypatch)
    for name, value in {"GRAPH_REPEATS": 1, "EAGER_REPEATS": 1, "RESERVE_BYTES": 0}.items():
        monkeypatch.setattr(slice_run, name, value)
    monkeypatch.setattr(rank_slice, "DEEPSEEK_V3", rank_slice.TINY)
    monkeypatch.setattr(rank_slice, "all_cases", rank_slice.tiny_cases)
    assert rank_slice.main(["--quick", "--only", phase, "--output", str(tmp_path)]) == 0
    assert "not captured" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "failed" not in (tmp_path / "report.md").read_text(encoding="utf-8")
