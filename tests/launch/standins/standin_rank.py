"""Rank processes without an engine, for the tests of the launcher: they live, talk and die as told.

No torch, so they start fast.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from moesaic.launch.engine.rank_spec import RankSpec


def sleep(_spec: RankSpec) -> None:
    """Live until told otherwise."""
    time.sleep(120)


def stubborn(_spec: RankSpec) -> None:
    """Live, and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _mark("stubborn")
    time.sleep(120)


def rank_one_exits(spec: RankSpec) -> None:
    """Rank 1 ends with code 7."""
    if spec.place.rank == 1:
        sys.exit(7)
    time.sleep(120)


def rank_one_is_killed_and_rank_zero_gives_up(spec: RankSpec) -> None:
    """As in a collective: rank 1 dies by a signal, and rank 0 fails because of it."""
    if spec.place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(1)


def with_a_child(_spec: RankSpec) -> None:
    """Start a helper process and end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    _mark(str(child.pid))
    sys.exit(0)


def report_environment(_spec: RankSpec) -> None:
    """Write down the environment and the arguments."""
    names = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "PYTHONSAFEPATH")
    _mark("\n".join(f"{name}={os.environ.get(name)}" for name in names))


def serve(spec: RankSpec) -> None:
    """Speak the engine's messages: be ready, beat, answer each request with one token, end on shutdown."""
    import zmq

    from moesaic.launch.engine import messages

    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(spec.to_rank_endpoint)
    outbox.connect(spec.from_rank_endpoint)
    lock = threading.Lock()

    def send(message: messages.FromRank) -> None:
        with lock:
            outbox.send(messages.encoder.encode(message))

    def beat() -> None:
        while True:
            send(messages.Heartbeat(rank=spec.place.rank, step=0, operation="idle", seconds=0))
            time.sleep(0.5)

    rank, dp_rank = spec.place.rank, spec.place.dp_rank
    for phase in ("join process group", "load weights"):
        send(messages.Progress(rank=rank, phase=phase, done=0, total=2))
        send(messages.Progress(rank=rank, phase=phase, done=2, total=2))
    send(messages.Ready(rank=rank, max_total_num_tokens=64, kv_bytes_per_token=4, weight_bytes=1, phase_seconds=[]))
    threading.Thread(target=beat, daemon=True).start()
    load = messages.LoadReport(
        dp_rank=dp_rank,
        num_running_reqs=0,
        num_waiting_reqs=0,
        num_used_tokens=0,
        max_total_num_tokens=64,
        num_waiting_tokens=0,
        gen_throughput=0.0,
        cache_hit_rate=0.0,
        num_retracted_reqs=0,
    )
    while True:
        message = messages.to_rank_decoder.decode(inbox.recv())
        if isinstance(message, messages.Control) and message.command == "shutdown":
            return
        # A prompt that begins with token 9 is never answered.
        if isinstance(message, messages.GenerateRequest) and message.input_ids[0] != 9 and spec.place.is_leader:
            output = messages.RequestOutput(rid=message.rid, token_ids=(3,), finish_reason="length")
            send(messages.StepOutputs(dp_rank=dp_rank, outputs=[output], load=load))


def _mark(text: str) -> None:
    """Leave a note for the test; the file appears whole or not at all."""
    path = Path(os.environ["STANDIN_NOTE"])
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").rename(path)
