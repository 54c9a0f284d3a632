"""Engines in which one operation of one rank fails in one forward, and leaves what it touches in the worst state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from engine_jobs import EngineSettings, Finished, greedy_request, make_engine, run_waves
from traffic_jobs import Traffic

from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import GenerateRequest
from moesaic.launch.models.layers import DenseDecoderLayer, SparseDecoderLayer
from moesaic.moe.communication import Pending
from moesaic.overlap.operations import OperationError, State

BOOM = "cosmic ray"
VICTIMS, SURVIVOR, AFTER = (0, 1), 2, (3, 4)
"""Numbers of a round's requests on each DP rank: in the step that fails, in the step after it, and those that come later."""
NUM_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`operation` of `layer` raises on `rank`: before it has done anything, or after it has done everything.

    decode: in the third step of its requests, else in their first. occurrence: the how-manieth time that it runs in the forward.
    """

    operation: str
    layer: int
    rank: int
    after: bool
    decode: bool
    occurrence: int = 0


class Saboteur:
    """Sits in every operation of one rank's engine."""

    def __init__(self, engine: RankEngine) -> None:
        model = engine.runner.model
        self._armed: tuple[Fault, int] | None = None
        self._num_forwards = 0
        self._num_seen = 0
        for layer in model._layers:
            for name in _operations(layer):
                setattr(layer, name, self._guarded(layer, name, getattr(layer, name)))
        model.order_split_steps()
        forward = engine.runner.forward

        def counted(*arguments: Any) -> Any:
            self._num_forwards += 1
            self._num_seen = 0
            return forward(*arguments)

        engine.runner.forward = counted  # type: ignore[method-assign]

    def arm(self, fault: Fault, forward: int) -> None:
        """For forward number `forward` of this engine, from 1 on."""
        self._armed = (fault, forward)

    def _guarded(
        self, layer: DenseDecoderLayer | SparseDecoderLayer, name: str, run: Callable[[State], None]
    ) -> Callable[[State], None]:
        @functools.wraps(run)
        def guarded(state: State) -> None:
            strikes = self._strikes(layer.index, name)
            inputs, pool = state.peek("inputs"), state.peek("pool")
            if strikes is None or strikes.after:
                run(state)
            if strikes is not None:
                pool.rows(layer.index)[inputs.metadata.slots] = torch.nan
                raise RuntimeError(BOOM)

        return guarded

    def _strikes(self, layer: int, name: str) -> Fault | None:
        if self._armed is None or self._armed[1] != self._num_forwards:
            return None
        fault = self._armed[0]
        if (fault.layer, fault.operation) != (layer, name):
            return None
        self._num_seen += 1
        return fault if self._num_seen == fault.occurrence + 1 else None


def _operations(layer: DenseDecoderLayer | SparseDecoderLayer) -> list[str]:
    return [name for name in dir(layer) if not name.startswith("_") and callable(getattr(layer, name))]


def failure_job(rank: int, settings: EngineSettings, faults: list[Fault], prompts: list[list[int]]) -> list[dict[int, Finished]]:
    """Job for a RankPool: one round of requests for each fault, on the same engine. Request i of DP rank d is 10 * d + i."""
    torch.set_num_threads(1)
    traffic = Traffic(make_engine(settings, rank))
    saboteur = Saboteur(traffic.engine)
    place = settings.topology.place(rank)
    own = prompts[place.dp_rank * 3 :][:3]
    num_launched = 0
    rounds = []
    for fault in faults:
        traffic.finished, traffic.ended = {}, set()
        first = 10 * place.dp_rank
        for i in VICTIMS:
            traffic.apply(greedy_request(first + i, own[i], NUM_TOKENS))
        steps_before = 2 if fault.decode else 0
        if fault.rank == rank:
            saboteur.arm(fault, num_launched + steps_before + 1)
        for _ in range(steps_before + 1):
            num_launched += not traffic.step().step.idle
        # With overlapped scheduling it is in the step that is launched while the one that fails has not been looked at.
        traffic.apply(greedy_request(first + SURVIVOR, own[2], NUM_TOKENS))
        num_launched += _run(traffic)
        assert not holds_nan(traffic.engine), f"{fault}: the KV of its step was not cleared"
        for i in AFTER:
            traffic.apply(greedy_request(first + i, own[i - AFTER[0]], NUM_TOKENS))
        num_launched += _run(traffic)
        rounds.append(traffic.finished)
        traffic.check_memory()
    return rounds if place.is_leader else []


def _run(traffic: Traffic) -> int:
    """Until all is quiet; returns how many steps ran."""
    num_launched = 0
    while not (step := traffic.step().step).quiet:
        num_launched += not step.idle
    return num_launched


def poisoned_token_job(
    rank: int, settings: EngineSettings, token: int, waves: list[list[GenerateRequest]]
) -> tuple[dict[int, Finished], bool]:
    """Job for a RankPool: as `engine_job`, with a model that knows one token as NaN; and whether any page holds NaN at the end."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    engine.runner.model._embedding[token] = torch.nan
    place = settings.topology.place(rank)
    finished = run_waves(engine, [[each for i, each in enumerate(wave) if i % settings.dp == place.dp_rank] for wave in waves])
    return finished if place.is_leader else {}, holds_nan(engine)


def holds_nan(engine: RankEngine) -> bool:
    """Whether any page does, whoever has it."""
    pool = engine.runner._pool
    assert pool is not None
    return any(bool(pool.rows(layer).isnan().any()) for layer in range(engine.runner.model_config.num_hidden_layers))


class _Lost:
    """A collective that completes and is then said to have failed, as when a peer is gone."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def wait(self) -> None:
        self._pending.wait()
        raise RuntimeError("Connection reset by peer")

    def when_done(self, callback: Callable[[], None]) -> None:
        """Never: it failed."""


class _LosesOne:
    """A `CommunicationWatcher` to whom all communications of one name fail."""

    def __init__(self, name: str) -> None:
        self._name = name

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        return _Lost(pending) if name == self._name else pending


def lost_collective_job(rank: int, settings: EngineSettings, name: str) -> tuple[str, bool]:
    """Job for a RankPool: all ranks lose the collectives of a name. What a rank's step raises, and whether that ends the rank."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    engine.runner.watch_communications(_LosesOne(name))
    engine.apply(greedy_request(rank, [5, 6, 7, 8], 4))
    try:
        engine.step()
    except OperationError as error:
        return str(error), error.fatal
    return "nothing was raised", False
