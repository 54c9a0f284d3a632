"""The process of one rank: joins the others, loads its weights, then runs the lockstep loop until told to stop.

Talks to the HTTP process over ZMQ (messages.py). Anything that goes wrong is reported as a RankError that names rank and operation
before the process exits with status 1; the launcher does the rest.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist
import zmq

from moesaic.kernels.native.build import why_missing
from moesaic.kernels.native.library import status
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.assembly import EngineSettings, assemble_engine
from moesaic.launch.engine.core import RankEngine, RequestMessage, StepResult
from moesaic.launch.engine.inbox import Inbox
from moesaic.launch.engine.memory import plan_num_pages
from moesaic.launch.engine.messages import FromRank, Heartbeat, Progress, RankError, Ready, StepOutputs, encoder
from moesaic.launch.engine.model_runner import ModelRunner, RunnerConfig
from moesaic.launch.engine.process_groups import join_process_groups, make_parallel_context, new_group_with_deadline
from moesaic.launch.engine.rank_spec import RankSpec
from moesaic.launch.engine.recording import RecordingSettings
from moesaic.launch.engine.scheduler import SchedulerConfig
from moesaic.launch.engine.step import StepRules
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.parallel import ParallelContext

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
IDLE_POLL_S = 1.0
LINGER_MS = 2000


def run_rank(spec: RankSpec) -> None:
    """Entry point of a rank process; returns after a clean stop, exits with status 1 after an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = f"%(asctime)s %(levelname)s rank {spec.place.rank} %(name)s: %(message)s"
    logging.basicConfig(level=spec.config.log_level.upper(), format=line)
    context = zmq.Context()
    activity = Activity(spec.place.rank)
    outbox = Outbox(spec.from_rank_endpoint)
    _start_heartbeat(spec, activity)
    try:
        RankProcess(spec, context, outbox, activity).run()
    except Exception as error:
        message = f"{activity.describe()}: {error}"
        print(message, file=sys.stderr, flush=True)
        outbox.send(RankError(rank=spec.place.rank, message=message, traceback=traceback.format_exc()))
        outbox.close()
        os._exit(1)
    os._exit(0)  # nobody reads what might still be queued: the HTTP process has closed its side


class Outbox:
    """A PUSH socket for messages of this rank. One per thread; each has its own context, so that `close` can wait for it alone."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(endpoint)

    def send(self, message: FromRank) -> None:
        self._socket.send(encoder.encode(message))

    def close(self) -> None:
        """Wait until what is queued has been delivered, at most LINGER_MS."""
        self._socket.close(LINGER_MS)
        self._context.term()


def _start_heartbeat(spec: RankSpec, activity: Activity) -> None:
    def beat() -> None:
        outbox = Outbox(spec.from_rank_endpoint)
        while True:
            operation, seconds = activity.current()
            status = activity.rebalance_status
            outbox.send(
                Heartbeat(
                    rank=spec.place.rank,
                    step=activity.step,
                    operation=operation,
                    seconds=seconds,
                    rebalance=None if status is None else status(),
                )
            )
            time.sleep(HEARTBEAT_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def _tell_of_kernels(device: str) -> None:
    """The launcher only compiles: kernels that can't be loaded into a rank must not go unnoticed."""
    if device == "cpu" and status().library is None and why_missing() is None:
        logger.warning("the compiled CPU kernels can't be loaded, so torch computes: %s", status().reason)


class PhaseTimer:
    """Reports each start-up phase as it begins and keeps how long it took."""

    def __init__(self, rank: int, outbox: Outbox, activity: Activity) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._rank = rank
        self._outbox = outbox
        self._activity = activity
        self._since = time.monotonic()
        self._phase = ""

    def enter(self, phase: str, total: int = 0) -> None:
        self.leave()
        self._phase = phase
        self._activity.enter(phase)
        self.report(0, total)

    def report(self, done: int, total: int) -> None:
        self._outbox.send(Progress(rank=self._rank, phase=self._phase, done=done, total=total))

    def leave(self) -> None:
        if self._phase:
            self.seconds.append((self._phase, time.monotonic() - self._since))
        self._since = time.monotonic()


class RankProcess:
    """Start-up and loop of one rank."""

    def __init__(self, spec: RankSpec, context: zmq.Context[zmq.Socket[bytes]], outbox: Outbox, activity: Activity) -> None:
        self._spec = spec
        self._outbox = outbox
        self._activity = activity
        socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(spec.to_rank_endpoint)
        self._inbox = Inbox(socket)

    def run(self) -> None:
        """Start up, say so, and step until a shutdown command."""
        engine = self._start()
        self._activity.enter("idle")
        announced: list[RequestMessage] = []
        while True:
            self._inbox.receive()
            for command in self._inbox.controls():
                engine.control(command)
            announced = self._announce(engine)
            result = engine.step(num_messages=len(announced))
            self._apply_announced(engine, announced, result)
            self._send(engine, result)
            if result.step.stop:
                return
            if result.step.quiet:
                self._activity.enter("idle")
                self._inbox.wait(IDLE_POLL_S)

    def _announce(self, engine: RankEngine) -> list[RequestMessage]:
        """Requests for the next step: a DP group of one rank takes them at once, a leader tells its group first."""
        place = self._spec.place
        if self._spec.topology.attn_tp_size == 1:
            for message in self._inbox.requests():
                engine.apply(message)
            return []
        return self._inbox.requests() if place.is_leader else []

    def _apply_announced(self, engine: RankEngine, announced: list[RequestMessage], result: StepResult) -> None:
        place = self._spec.place
        if self._spec.topology.attn_tp_size > 1 and not place.is_leader:
            count = result.step.num_messages[place.dp_rank]
            announced = self._inbox.take(count, self._spec.config.dist_timeout) if count else []
        for message in announced:
            engine.apply(message)

    def _send(self, engine: RankEngine, result: StepResult) -> None:
        if not self._spec.place.is_leader:
            return
        dp_rank = self._spec.place.dp_rank
        if result.outputs or not result.step.quiet:
            self._outbox.send(
                StepOutputs(
                    dp_rank=dp_rank,
                    outputs=result.outputs,
                    rids=result.rids,
                    tokens=result.tokens,
                    load=engine.load(dp_rank),
                )
            )
        for reply in result.replies:
            self._outbox.send(reply)

    def _start(self) -> RankEngine:
        spec, config = self._spec, self._spec.config
        torch.set_num_threads(config.num_threads)
        _tell_of_kernels(config.device)
        phases = PhaseTimer(spec.place.rank, self._outbox, self._activity)
        phases.enter("join process group")
        join_process_groups(
            spec.topology,
            spec.place,
            init_method=spec.dist_init_method,
            backend=config.communication_backend,
            timeout_s=config.dist_timeout,
        )
        new_group = new_group_with_deadline(config.dist_timeout)
        parallel = make_parallel_context(
            spec.topology,
            spec.place,
            a2a_backend=config.moe_a2a_backend,
            dp_lm_head=config.enable_dp_lm_head,
            new_group=new_group,
        )
        rebalance_group = None if spec.rebalance is None else new_group(tuple(range(spec.topology.world_size)))
        runner = self._load(parallel, phases)
        phases.enter("allocate KV")
        num_pages = self._agree(plan_num_pages(config, runner.kv_bytes_per_token, spec.topology.ranks_per_node), parallel)
        runner.allocate_kv(num_pages)
        phases.leave()
        self._outbox.send(
            Ready(
                rank=spec.place.rank,
                max_total_num_tokens=num_pages * config.page_size,
                kv_bytes_per_token=runner.kv_bytes_per_token,
                weight_bytes=runner.weight_bytes,
                phase_seconds=phases.seconds,
            )
        )
        return self._engine(runner, num_pages, rebalance_group)

    def _load(self, parallel: ParallelContext, phases: PhaseTimer) -> ModelRunner:
        config = self._spec.config
        model_config = load_model_config(config.model_path)
        total = ModelRunner.count_tensors(model_config, parallel, self._spec.slots)
        phases.enter("load weights", total)
        done = 0

        def on_tensor() -> None:
            nonlocal done
            done += 1
            if done % 64 == 0 or done == total:
                phases.report(done, total)

        return ModelRunner(
            RunnerConfig(
                model_path=config.model_path,
                load_format=config.load_format,
                dtype=getattr(torch, config.dtype),
                device=self._device(),
                context_length=config.context_length,
                page_size=config.page_size,
                attention_backend=config.attention_backend,
                expert_runner=config.moe_runner_backend,
                fp8_activations=config.quantization == "fp8",
                slots=self._spec.slots,
            ),
            model_config,
            parallel,
            on_tensor,
        )

    def _device(self) -> str:
        """This rank's device; on CUDA also the one that new streams and groups of this process use."""
        if self._spec.config.device == "cpu":
            return "cpu"
        torch.cuda.set_device(self._spec.place.local_rank)
        return f"cuda:{self._spec.place.local_rank}"

    def _agree(self, num_pages: int, parallel: ParallelContext) -> int:
        """The smallest pool of all ranks, so that the ranks of a DP group schedule alike."""
        if parallel.world_size == 1:
            return num_pages
        smallest = torch.tensor([num_pages])
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=parallel.world_group)
        return int(smallest.item())

    def _engine(self, runner: ModelRunner, num_pages: int, rebalance_group: dist.ProcessGroup | None) -> RankEngine:
        config, topology = self._spec.config, self._spec.topology
        settings = EngineSettings(
            scheduler=SchedulerConfig(
                num_pages=num_pages,
                page_size=config.page_size,
                max_running=config.max_running_requests_per_dp,
                context_length=config.context_length,
                chunk_tokens=config.chunked_prefill_tokens_per_dp,
                policy=config.schedule_policy,
                prefix_cache=config.enable_prefix_cache,
            ),
            rules=StepRules(
                attn_tp_size=topology.attn_tp_size,
                a2a=config.moe_a2a_backend != "none",
                mode=config.dispatch_mode,
                cap=config.max_dispatch_tokens_per_rank,
            ),
            recording=RecordingSettings(mode=config.recorder_mode, buffer_size=config.recorder_buffer_size),
            rebalance=self._spec.rebalance,
        )
        return assemble_engine(settings, runner, self._activity, rebalance_group)
