"""Real engines under scripted traffic: messages that arrive in the middle of things, triggered by what clients have been sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from engine_jobs import EngineSettings, Finished, collect, make_engine
from tiny_models import TinyModel

from moesaic.launch.engine.core import RankEngine, RequestMessage, StepResult
from moesaic.launch.engine.messages import AbortRequest, RequestOutput, SamplingParams, every_output

MAX_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A message for DP rank `home` % dp: before call number `step` of `step`, or, `follows`, as soon as that request has been sent
    `tokens` tokens (None: its end).
    """

    message: RequestMessage
    home: int = 0
    step: int = 0
    follows: int | None = None
    tokens: int | None = None

    def is_due(self, num_steps: int, finished: dict[int, Finished]) -> bool:
        if self.follows is None:
            return num_steps >= self.step
        entry = finished.get(self.follows, Finished())
        return entry.finish_reason is not None if self.tokens is None else len(entry.tokens) >= self.tokens


@dataclass
class Traffic:
    """One engine's traffic so far. `ended`: requests of which nothing may be sent any more."""

    engine: RankEngine
    finished: dict[int, Finished] = field(default_factory=dict)
    num_steps: int = 0
    ended: set[int] = field(default_factory=set)

    def run(self, arrivals: list[Arrival]) -> None:
        """Until nobody has anything to do. Collective."""
        waiting = list(arrivals)
        while True:
            for arrival in [each for each in waiting if each.is_due(self.num_steps, self.finished)]:
                waiting.remove(arrival)
                self.apply(arrival.message)
            if self.step().step.quiet:
                break
            assert self.num_steps < MAX_STEPS, "the engine runs on and on"
        assert not waiting, f"{len(waiting)} messages were never due"

    def apply(self, message: RequestMessage) -> None:
        self.engine.apply(message)
        if isinstance(message, AbortRequest) and message.finish:
            self.ended.add(message.rid)

    def step(self) -> StepResult:
        result = self.engine.step()
        self.num_steps += 1
        before = set(self.ended)
        collect(self.finished, self._checked(every_output(result.outputs, result.rids, result.tokens)))
        for rid in self.ended - before:
            self.finished[rid].last_step = self.num_steps
        return result

    def _checked(self, outputs: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
        for output in outputs:
            assert output.rid not in self.ended, f"request {output.rid} was sent {output} after its end"
            if output.finish_reason is not None:
                self.ended.add(output.rid)
            yield output

    def check_memory(self) -> None:
        """Every page is free or only cached, every slot free."""
        scheduler = self.engine.scheduler
        assert scheduler.num_used_tokens == 0, f"{scheduler.num_used_tokens} tokens of KV leaked"
        assert scheduler.num_running == scheduler.num_waiting == 0
        host = self.engine.runner.host_kv
        assert host is None or host.num_free == host.num_pages, "pages of host memory leaked"
        scheduler.cache.flush()
        assert scheduler.cache.allocator.num_free == scheduler.config.num_pages


def traffic_job(rank: int, settings: EngineSettings, arrivals: list[Arrival]) -> tuple[dict[int, Finished], int]:
    """Job for a RankPool: what each rank's engine has sent (the ranks of a DP group the same), and how often it retracted."""
    torch.set_num_threads(1)
    traffic = Traffic(make_engine(settings, rank))
    dp_rank = settings.topology.place(rank).dp_rank
    traffic.run([arrival for arrival in arrivals if arrival.home % settings.dp == dp_rank])
    traffic.check_memory()
    retraction = traffic.engine.load(dp_rank).retraction
    assert retraction is None or retraction.num_restored_tokens > 0, "nothing was kept in host memory"
    return traffic.finished, traffic.engine.scheduler.num_retracted


def merged_traffic(settings: EngineSettings, results: list[tuple[dict[int, Finished], int]]) -> dict[int, Finished]:
    """All DP ranks' requests; the ranks of a DP group must have said the same."""
    everything: dict[int, Finished] = {}
    for place, (finished, _) in zip(map(settings.topology.place, range(settings.tp)), results, strict=True):
        if place.is_leader:
            everything |= finished
        else:
            assert {rid: everything[rid].tokens for rid in finished} == {rid: each.tokens for rid, each in finished.items()}
    return everything


def penalised_greedy(model: TinyModel, prompt: list[int], num_tokens: int, sampling: SamplingParams) -> list[int]:
    """The oracle's tokens under frequency, presence (OpenAI's formulas) and repetition penalties (CTRL's)."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = model.logits(tokens)[-1]
        counts = torch.bincount(torch.tensor(tokens[len(prompt) :], dtype=torch.int64), minlength=len(logits))
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        scaled = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        seen = torch.zeros(len(logits), dtype=torch.bool).index_fill_(0, torch.tensor(tokens), True)
        tokens.append(int(torch.where(seen, scaled, logits).argmax()))
    return tokens[len(prompt) :]
