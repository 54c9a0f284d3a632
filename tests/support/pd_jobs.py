"""A prefill and a decode instance of several ranks in the workers of the pool: real engines, collectives and transports, no HTTP.

A worker may host a rank of each.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from engine_jobs import EngineSettings, Finished, collect, greedy_request, make_engine
from pd_ranks import PATIENT
from rank_pool import group_of

from moesaic.launch.disaggregation.backends import BackendName, make_backend
from moesaic.launch.disaggregation.bootstrap import registration
from moesaic.launch.disaggregation.bootstrap_client import register_rank
from moesaic.launch.disaggregation.decode_rooms import DecodeRooms
from moesaic.launch.disaggregation.directory import DecodeRank
from moesaic.launch.disaggregation.layout import PageRun, prefill_dp_rank
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.prefill_rooms import PrefillRooms
from moesaic.launch.disaggregation.protocol import KVLayout
from moesaic.launch.disaggregation.receiver import DecodeTransfer
from moesaic.launch.disaggregation.sender import PrefillTransfer
from moesaic.launch.disaggregation.transfer import Backend, Read
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import Bootstrap, GenerateRequest, RequestOutput, every_output


@dataclass(frozen=True, kw_only=True)
class PdSettings:
    """`port`: of the bootstrap server. `prefill_first`: the worker that hosts prefill's rank 0, while decode's is on worker 0. The
    pool has groups for two ranks from worker 2 on.
    """

    prefill: EngineSettings
    decode: EngineSettings
    backend: BackendName
    port: int
    prefill_first: int = 2

    @property
    def num_workers(self) -> int:
        return max(self.prefill_first + self.prefill.tp, self.decode.tp)


@dataclass
class Served:
    """What a rank sent, by request; `num_outputs`: in how many pieces. `pages`: those that it fetched in each wave."""

    finished: dict[int, Finished] = field(default_factory=dict)
    num_outputs: dict[int, int] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)

    def collect(self, outputs: Iterable[RequestOutput]) -> None:
        outputs = list(outputs)
        collect(self.finished, outputs)
        for output in outputs:
            self.num_outputs[output.rid] = self.num_outputs.get(output.rid, 0) + bool(output.token_ids)


@dataclass
class Instance:
    """One rank of an instance. `waves`: the requests of its DP rank."""

    engine: RankEngine
    served: Served
    waves: list[list[GenerateRequest]]

    def begin(self, wave: int) -> None:
        self.served.pages.append(0)
        for request in self.waves[wave]:
            self.engine.apply(request)

    def step(self) -> bool:
        """One lockstep step. False once the instance has nothing left to do."""
        self.served.collect(self.engine.advance_rooms())
        result = self.engine.step()
        self.served.collect(every_output(result.outputs, result.rids, result.tokens))
        if result.step.idle:
            time.sleep(0.0005)
        return not result.step.quiet

    def check_leaks(self, settings: EngineSettings) -> None:
        leaked = settings.num_pages - self.engine.scheduler.cache.available_pages()
        assert leaked == 0, f"{leaked} pages leaked"


def pd_wave(prompts: Sequence[Sequence[int]], num_tokens: int, first_room: int, port: int) -> list[GenerateRequest]:
    """A request per prompt; a request's id is its room."""
    requests = [greedy_request(first_room + place, list(prompt), num_tokens) for place, prompt in enumerate(prompts)]
    return [msgspec.structs.replace(one, bootstrap=Bootstrap(host="127.0.0.1", port=port, room=one.rid)) for one in requests]


def pd_job(worker: int, settings: PdSettings, waves: list[list[GenerateRequest]]) -> tuple[Served, Served]:
    """Job for a RankPool: each wave runs to its end before the next. (what prefill's rank here sent, what decode's did)."""
    torch.set_num_threads(1)
    prefilled, decoded = Served(), Served()
    with contextlib.ExitStack() as stack:
        instances: list[Instance] = []
        if 0 <= worker - settings.prefill_first < settings.prefill.tp:
            instances.append(stack.enter_context(_prefill(worker - settings.prefill_first, settings, prefilled, waves)))
        if worker < settings.decode.tp:
            instances.append(stack.enter_context(_decode(worker, settings, decoded, waves)))
        for wave in range(len(waves)):
            for instance in instances:
                instance.begin(wave)
            busy = list(instances)
            while busy:
                busy = [instance for instance in busy if instance.step()]
    return prefilled, decoded


@contextlib.contextmanager
def _prefill(rank: int, settings: PdSettings, served: Served, waves: list[list[GenerateRequest]]) -> Iterator[Instance]:
    own, first = settings.prefill, settings.prefill_first
    place = own.topology.place(rank)
    engine = make_engine(own, rank, lambda ranks, purpose: group_of(tuple(first + other for other in ranks), purpose))
    memory = PagedMemory.from_tensors(engine.runner.kv_pages())
    transfer = PrefillTransfer(
        instance="p0",
        rank=rank,
        layout=_layout(own, engine),
        memory=memory,
        backend=make_backend(settings.backend, memory),
        deadlines=PATIENT,
    )
    with contextlib.closing(transfer), contextlib.closing(engine):
        who = registration(
            transfer.layout, instance="p0", dp_rank=place.dp_rank, attn_tp_rank=place.attn_tp_rank, address=transfer.address
        )
        register_rank(f"127.0.0.1:{settings.port}", who)
        engine.attach(PrefillRooms(transfer, engine.scheduler, engine.results))
        mine = [[one for one in wave if prefill_dp_rank(one.rid, own.dp) == place.dp_rank] for wave in waves]
        instance = Instance(engine, served, mine)
        yield instance
        instance.check_leaks(own)


@contextlib.contextmanager
def _decode(rank: int, settings: PdSettings, served: Served, waves: list[list[GenerateRequest]]) -> Iterator[Instance]:
    own = settings.decode
    place = own.topology.place(rank)
    engine = make_engine(own, rank)
    memory = PagedMemory.from_tensors(engine.runner.kv_pages())
    backend = _counting(make_backend(settings.backend, memory), served)
    who = DecodeRank(instance="d0", rank=rank, layout=_layout(own, engine))
    transfer = DecodeTransfer(rank=who, memory=memory, backend=backend, deadlines=PATIENT, checksum=True)
    with contextlib.closing(transfer), contextlib.closing(engine):
        engine.attach(DecodeRooms(transfer, engine.scheduler, engine.results))
        mine = [[one for number, one in enumerate(wave) if number % own.dp == place.dp_rank] for wave in waves]
        instance = Instance(engine, served, mine)
        yield instance
        instance.check_leaks(own)


def _layout(settings: EngineSettings, engine: RankEngine) -> KVLayout:
    return KVLayout(
        model_id="tiny",
        tp_size=settings.tp,
        dp_size=settings.dp,
        ep_size=settings.topology.ep_size,
        page_size=settings.page_size,
        kv_dtype="float32",
        bytes_per_token=engine.runner.kv_bytes_per_token,
        num_layers=engine.runner.model_config.num_hidden_layers,
    )


def _counting(backend: Backend, served: Served) -> Backend:
    """The backend; what it is asked to read is counted."""
    read = backend.read

    def counted(peer: str, runs: Sequence[PageRun]) -> Read:
        served.pages[-1] += sum(run.num_pages for run in runs)
        return read(peer, runs)

    backend.read = counted  # type: ignore[method-assign]
    return backend
