"""Ranks without a model, for tests of the HTTP layer alone: real messages over real ZMQ sockets, one thread per rank.

An echo rank answers with the prompt's own tokens, over and over, one per step, until `max_new_tokens` or a stop token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from moesaic.launch.engine.messages import (
    AbortRequest,
    Control,
    ControlReply,
    FromRank,
    GenerateRequest,
    Heartbeat,
    LoadReport,
    Progress,
    RankError,
    Ready,
    RebalanceStatus,
    RequestOutput,
    StepOutputs,
    TokenLogprobs,
    ToRank,
    encoder,
    to_rank_decoder,
)
from moesaic.launch.http.config import HttpConfig

KV_TOKENS = 100_000


@dataclass
class _Running:
    request: GenerateRequest
    answer: list[int]
    sent: int = 0


@dataclass
class EchoRank:
    """`received` is every message in order. The switches below may be set at any time, from any thread."""

    rank: int
    config: HttpConfig
    answer: Callable[[GenerateRequest], list[int]] | None = None
    received: list[ToRank] = field(default_factory=list)
    rebalance: RebalanceStatus | None = None
    paused: bool = False  # takes messages, makes no steps
    silent: bool = False  # sends no heartbeat
    operation: str = "idle"
    operation_seconds: float = 0.0
    step_seconds: float = 0.0
    refuse_control: bool = False
    failure: str | None = None  # ends the requests of the next step as a failed step does
    error: RankError | None = None
    _running: dict[int, _Running] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"echo rank {self.rank}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(5)

    def generates(self) -> list[GenerateRequest]:
        return [message for message in list(self.received) if isinstance(message, GenerateRequest)]

    def aborts(self) -> list[AbortRequest]:
        return [message for message in list(self.received) if isinstance(message, AbortRequest)]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def _dp_rank(self) -> int:
        return self.rank // self.config.attn_tp_size

    @property
    def _leads(self) -> bool:
        return self.rank % self.config.attn_tp_size == 0

    def _run(self) -> None:
        context = zmq.Context()
        inbox, self._outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        inbox.connect(self.config.to_rank_endpoints[self.rank])
        self._outbox.connect(self.config.from_rank_endpoint)
        self._send(Progress(rank=self.rank, phase="load weights", done=1, total=1))
        self._send(self._ready())
        beat_at = 0.0
        try:
            while not self._ended.is_set():
                if not self.silent and time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + 0.05
                    self._send(
                        Heartbeat(
                            rank=self.rank,
                            step=0,
                            operation=self.operation,
                            seconds=self.operation_seconds,
                            rebalance=self.rebalance,
                        )
                    )
                if self.error is not None:
                    self._send(self.error)
                    return
                busy = bool(self._running) and not self.paused
                while inbox.poll(0 if busy else 20):
                    self._take(to_rank_decoder.decode(inbox.recv()))
                if busy:
                    time.sleep(self.step_seconds)
                    self._step()
        finally:
            inbox.close(linger=0)
            self._outbox.close(linger=200)
            context.term()

    def _ready(self) -> Ready:
        return Ready(
            rank=self.rank,
            max_total_num_tokens=KV_TOKENS,
            kv_bytes_per_token=1024,
            weight_bytes=1 << 20,
            phase_seconds=[("load weights", 0.1)],
        )

    def _send(self, message: FromRank) -> None:
        self._outbox.send(encoder.encode(message))

    def _take(self, message: ToRank) -> None:
        self.received.append(message)
        match message:
            case GenerateRequest():
                answer = list(message.input_ids) if self.answer is None else self.answer(message)
                self._running[message.rid] = _Running(message, answer)
            case AbortRequest():
                if self._running.pop(message.rid, None) is not None and not message.finish and self._leads:
                    output = RequestOutput(rid=message.rid, token_ids=(), finish_reason="abort", message="aborted")
                    self._send(StepOutputs(dp_rank=self._dp_rank, outputs=[output], load=self._load()))
            case Control():
                if self._leads:
                    ok, text = not self.refuse_control, f"{message.command} by {self._dp_rank}"
                    files = () if message.profile is None else (f"{message.profile.profile_id}-rank{self.rank}.trace.json",)
                    reply = ControlReply(control_id=message.control_id, dp_rank=self._dp_rank, ok=ok, message=text, files=files)
                    self._send(reply)

    def _load(self) -> LoadReport:
        tokens = sum(len(running.request.input_ids) + running.sent for running in self._running.values())
        return LoadReport(
            dp_rank=self._dp_rank,
            num_running_reqs=len(self._running),
            num_waiting_reqs=0,
            num_used_tokens=tokens,
            max_total_num_tokens=KV_TOKENS,
            num_waiting_tokens=0,
            gen_throughput=100.0,
            cache_hit_rate=0.5,
            num_retracted_reqs=0,
        )

    def _step(self) -> None:
        failure, self.failure = self.failure, None
        outputs = [self._fail(rid, failure) if failure else self._advance(rid) for rid in list(self._running)]
        if self._leads:
            self._send(StepOutputs(dp_rank=self._dp_rank, outputs=outputs, load=self._load()))

    def _fail(self, rid: int, message: str) -> RequestOutput:
        del self._running[rid]
        return RequestOutput(rid=rid, token_ids=(), finish_reason="abort", message=message, failed=True)

    def _advance(self, rid: int) -> RequestOutput:
        running = self._running[rid]
        request, first = running.request, running.sent == 0
        limit = request.sampling.max_new_tokens
        token_ids = (running.answer[running.sent % len(running.answer)],) if limit else ()
        running.sent += len(token_ids)
        stopped = bool(token_ids) and token_ids[0] in request.sampling.stop_token_ids
        finish = "stop" if stopped else "length" if running.sent >= limit else None
        if finish is not None:
            del self._running[rid]
        return RequestOutput(
            rid=rid,
            token_ids=token_ids,
            finish_reason=finish,  # type: ignore[arg-type]
            matched=token_ids[0] if stopped else None,
            cached_tokens=1 if first else 0,
            logprobs=tuple(_logprobs(token, -0.25, request) for token in token_ids) if request.return_logprob else (),
            prompt_logprobs=tuple(_prompt_logprobs(request)) if first else (),
            queue_seconds=0.001 if first else None,
        )


def _logprobs(token_id: int, logprob: float | None, request: GenerateRequest) -> TokenLogprobs:
    top = [(token_id + place, -0.25 - place) for place in range(request.top_logprobs_num)]
    return TokenLogprobs(token_id=token_id, logprob=logprob, top=[] if logprob is None else top)


def _prompt_logprobs(request: GenerateRequest) -> list[TokenLogprobs]:
    if not request.return_logprob or request.logprob_start_len < 0:
        return []
    tokens = list(enumerate(request.input_ids))[request.logprob_start_len :]
    return [_logprobs(token, None if place == 0 else -1.0, request) for place, token in tokens]
