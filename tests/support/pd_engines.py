"""A prefill and a decode engine in this process, stepped by hand; pages are copied when the test lets them be."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from engine_jobs import EngineSettings, Finished, collect, greedy_request, make_engine
from pd_ranks import next_room

from moesaic.launch.disaggregation.bootstrap import BootstrapServer, registration
from moesaic.launch.disaggregation.bootstrap_client import register_rank
from moesaic.launch.disaggregation.decode_rooms import DecodeRooms
from moesaic.launch.disaggregation.directory import DecodeRank
from moesaic.launch.disaggregation.fake import FakeBackend
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.prefill_rooms import PrefillRooms
from moesaic.launch.disaggregation.protocol import Deadlines, KVLayout
from moesaic.launch.disaggregation.receiver import DecodeTransfer
from moesaic.launch.disaggregation.sender import PrefillTransfer
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import AbortRequest, Bootstrap, GenerateRequest, every_output

DEADLINES = Deadlines(bootstrapping=20.0, waiting=20.0, transferring=20.0)


@dataclass
class Side:
    """One engine with its rooms and what it has sent to clients. `num_extends`: steps that computed prompts."""

    engine: RankEngine
    rooms: PrefillRooms | DecodeRooms
    transfer: PrefillTransfer | DecodeTransfer
    finished: dict[int, Finished] = field(default_factory=dict)
    num_extends: int = 0

    def step(self) -> None:
        collect(self.finished, self.engine.advance_rooms())
        result = self.engine.step()
        self.num_extends += result.step.extends
        collect(self.finished, every_output(result.outputs, result.rids, result.tokens))

    def stages(self) -> list[str]:
        """The stages of all open rooms."""
        return [entry.stage.name for entry in self.rooms._rooms._entries.values()]

    @property
    def used_host_pages(self) -> int:
        host = self.engine.runner.host_kv
        return 0 if host is None else host.num_pages - host.num_free

    @property
    def used_pages(self) -> int:
        return self.engine.scheduler.config.num_pages - self.engine.scheduler.cache.available_pages()


@dataclass
class Engines:
    """`backend`: decode's; while it is `held`, no page arrives."""

    prefill: Side
    decode: Side
    backend: FakeBackend
    port: int

    def request(self, rid: int, prompt: list[int], num_tokens: int, **options: Any) -> GenerateRequest:
        bootstrap = Bootstrap(host="127.0.0.1", port=self.port, room=next_room())
        return msgspec.structs.replace(greedy_request(rid, prompt, num_tokens, **options), bootstrap=bootstrap)

    def send(self, *requests: GenerateRequest) -> None:
        """To both sides, as a router does."""
        for request in requests:
            self.prefill.engine.apply(request)
            self.decode.engine.apply(request)

    def step_until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Step both engines until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"stages: {self.prefill.stages()} {self.decode.stages()}"
            self.prefill.step()
            self.decode.step()
            time.sleep(0.0005)

    def step_to_rest(self) -> None:
        """Until nobody has anything left to do."""
        self.step_until(
            lambda: not any(side.rooms.num_open or side.engine.scheduler.has_work() for side in (self.prefill, self.decode))
        )

    def nothing_held(self) -> bool:
        return self.prefill.used_pages == self.decode.used_pages == self.decode.used_host_pages == 0


def abort(side: Side, rid: int) -> None:
    side.engine.apply(AbortRequest(rid=rid))


@contextlib.contextmanager
def pd_engines(settings: EngineSettings) -> Iterator[Engines]:
    """Both with these settings, connected by the fake backend."""
    layout = KVLayout(
        model_id="tiny",
        tp_size=1,
        dp_size=1,
        ep_size=1,
        page_size=settings.page_size,
        kv_dtype="float32",
        bytes_per_token=1,
        num_layers=1,
    )
    with BootstrapServer(port=0) as server, contextlib.ExitStack() as stack:
        port = server.address[1]
        first, second = make_engine(settings), make_engine(settings)
        stack.callback(first.close)
        stack.callback(second.close)
        theirs, ours = PagedMemory.from_tensors(first.runner.kv_pages()), PagedMemory.from_tensors(second.runner.kv_pages())
        sending = PrefillTransfer(
            instance="p0", rank=0, layout=layout, memory=theirs, backend=FakeBackend(theirs), deadlines=DEADLINES
        )
        stack.callback(sending.close)
        register_rank(f"127.0.0.1:{port}", registration(layout, instance="p0", dp_rank=0, attn_tp_rank=0, address=sending.address))
        backend = FakeBackend(ours)
        who = DecodeRank(instance="d0", rank=0, layout=layout)
        receiving = DecodeTransfer(rank=who, memory=ours, backend=backend, deadlines=DEADLINES, checksum=True)
        stack.callback(receiving.close)
        prefill_rooms = PrefillRooms(sending, first.scheduler, first.results)
        decode_rooms = DecodeRooms(receiving, second.scheduler, second.results)
        first.attach(prefill_rooms)
        second.attach(decode_rooms)
        yield Engines(Side(first, prefill_rooms, sending), Side(second, decode_rooms, receiving), backend, port)
