"""Engines whose forwards are watched: the same traffic as anywhere, and what kinds of steps it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from engine_jobs import EngineSettings, Finished, make_engine
from traffic_jobs import Arrival, Traffic

from moesaic.launch.engine.core import RankEngine
from moesaic.launch.models.forward import ForwardInput, ForwardSplit


@dataclass(frozen=True, kw_only=True)
class ForwardSeen:
    """One rank's forward. inside: it was cut inside a sequence whose first tokens had their KV already."""

    num_tokens: int
    extends: bool
    split: bool
    inside: bool


def watch_forwards(engine: RankEngine) -> list[ForwardSeen]:
    """Notes all forwards from now on."""
    seen: list[ForwardSeen] = []
    forward = engine.runner.forward

    def noted(inputs: ForwardInput, observer: Any = None, split: ForwardSplit | None = None, graph: Any = None) -> Any:
        seen.append(
            ForwardSeen(
                num_tokens=len(inputs.input_ids),
                extends=bool(inputs.metadata.extends),
                split=split is not None,
                inside=split is not None and _inside_on_a_prefix(split),
            )
        )
        return forward(inputs, observer, split, graph)

    engine.runner.forward = noted  # type: ignore[method-assign]
    return seen


def _inside_on_a_prefix(split: ForwardSplit) -> bool:
    before, after = split.first.metadata.extends, split.second.metadata.extends
    if not before or not after:
        return False
    last, first = before[-1], after[0]
    return (
        last.prefix_len > 0 and first.prefix_len == last.prefix_len + last.length and bool((last.pages[0] == first.pages[0]).all())
    )


def overlap_job(rank: int, settings: EngineSettings, waves: list[list[Arrival]]) -> tuple[dict[int, Finished], list[ForwardSeen]]:
    """Job for a RankPool: waves run to their end one after the other. The leader's outputs (empty on others), and the forwards."""
    torch.set_num_threads(1)
    traffic = Traffic(make_engine(settings, rank))
    seen = watch_forwards(traffic.engine)
    place = settings.topology.place(rank)
    for wave in waves:
        traffic.run([arrival for arrival in wave if arrival.home % settings.dp == place.dp_rank])
    traffic.check_memory()
    return traffic.finished if place.is_leader else {}, seen
