"""Jobs run one after the other as they were submitted; what they raise reaches whoever asks; the thread ends with its worker."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from moesaic.launch.engine.forward_worker import ForwardWorker, InlineWorker, ThreadWorker

CPU = torch.device("cpu")
WORKERS: dict[str, Callable[[], ForwardWorker]] = {"inline": InlineWorker, "thread": lambda: ThreadWorker(CPU)}


def _thread_of(worker: ForwardWorker) -> threading.Thread:
    return worker.submit(threading.current_thread).result()


@pytest.mark.parametrize("name", WORKERS)
def test_jobs_run_in_order_and_an_error_is_raised_to_who_asks_each_time(name: str) -> None:
    worker, ran = WORKERS[name](), list[int]()

    def fail() -> None:
        raise ValueError("no")

    pending = [worker.submit(lambda number=number: ran.append(number) or number) for number in range(20)]  # type: ignore[misc]
    failed = worker.submit(fail)
    after = worker.submit(lambda: "goes on")
    assert [each.result() for each in pending] == ran == list(range(20))
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            failed.result()
    assert after.result() == "goes on"
    worker.close()


def test_a_threads_jobs_run_beside_the_caller_and_inline_ones_in_his_thread() -> None:
    for name, beside in (("inline", False), ("thread", True)):
        worker = WORKERS[name]()
        assert (worker.submit(threading.get_ident).result() != threading.get_ident()) == beside
        worker.close()


def test_a_closed_worker_finishes_what_it_was_given_and_its_thread_ends() -> None:
    worker, go_on = ThreadWorker(CPU), threading.Event()
    thread = _thread_of(worker)
    pending = [worker.submit(lambda: go_on.wait(10)) for _ in range(3)]
    worker.close()
    go_on.set()
    assert all(each.result() for each in pending)
    thread.join(10)
    assert not thread.is_alive()


def test_a_dropped_worker_leaves_no_thread_and_keeps_nothing_alive() -> None:
    worker = ThreadWorker(CPU)
    thread = _thread_of(worker)
    del worker
    thread.join(10)
    assert not thread.is_alive()
