"""Stages: what runs between two yields, and the joining of layers into one list of them.

Layers are joined before they are cut: the last stage of one and the first of the next are one stage, so there is no yield between
layers unless a list ends (or begins) with one. n yields make n + 1 stages; a stage may be empty: then its turn passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.overlap.operations import Operation, OperationList

Stage = tuple[Operation, ...]


class BadStages(ValueError):  # noqa: N818 - reads as what is wrong
    """An operation list does not fit the strategy it is built for."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How two micro-batches share a step.

    name: of the strategy, for errors. yields_per_layer: every layer's list must have as many, or the micro-batches would meet in
    other places of a layer than the strategy was written for. delta_stages: by how many stages the first one runs ahead.
    """

    name: str
    yields_per_layer: int
    delta_stages: int

    def __post_init__(self) -> None:
        if self.yields_per_layer < 1:
            raise BadStages(f"strategy {self.name}: yields_per_layer is {self.yields_per_layer}; overlap needs 1 or more")
        if self.delta_stages < 0:
            raise BadStages(f"strategy {self.name}: delta_stages is {self.delta_stages}; it is 0 or more")


def cut_into_stages(operations: OperationList) -> tuple[Stage, ...]:
    """The operations between the yields; no yield gives one stage."""
    stages: list[list[Operation]] = [[]]
    for each in operations:
        if isinstance(each, Operation):
            stages[-1].append(each)
        else:
            stages.append([])
    return tuple(map(tuple, stages))


def join_layers(layers: Mapping[int, OperationList], strategy: Strategy) -> tuple[Stage, ...]:
    """The stages of a step. layers: index of the layer -> its list, in the order they run.

    Raises BadStages that names layer and stage when a list's yields don't fit the strategy, and when the whole has no more stages
    than the strategy's offset (the micro-batches would run one after the other).
    """
    for index, operations in layers.items():
        _check_layer(index, cut_into_stages(operations), strategy)
    stages = cut_into_stages([each for operations in layers.values() for each in operations])
    if strategy.delta_stages >= len(stages):
        raise BadStages(
            f"strategy {strategy.name}: delta_stages {strategy.delta_stages} leaves nothing to overlap in {len(stages)} stages "
            f"({len(layers)} layers); use {len(stages) - 1} or less"
        )
    return stages


def _check_layer(index: int, stages: tuple[Stage, ...], strategy: Strategy) -> None:
    wanted = strategy.yields_per_layer + 1
    if len(stages) == wanted:
        return
    cause = (
        f"stage {wanted} ({_names(stages[wanted])}) is one too many: take out the yield before it"
        if len(stages) > wanted
        else f"stage {len(stages) - 1} ({_names(stages[-1])}) is the last, where {wanted} are expected: a yield is missing"
    )
    declared = f"strategy {strategy.name} declares {strategy.yields_per_layer} yields, the list has {len(stages) - 1}"
    raise BadStages(f"layer {index}: {declared}; {cause}")


def _names(stage: Stage) -> str:
    return ", ".join(operation.name for operation in stage) or "empty"
