"""A step as lists of operations with yield points, and the schedules made of them: straight, or two micro-batches.

An order says which operations of a layer run, in which order and where another micro-batch may run. All orders are of the same
operations (layers.py): no layer is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moesaic.launch.models.blanks import blanks_of
from moesaic.launch.models.layers import DenseDecoderLayer, SparseDecoderLayer
from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import Operation, State, YieldOperation
from moesaic.overlap.stages import Strategy, cut_into_stages, join_layers

LayerOperations = list[Operation | YieldOperation]


def dense_operations(layer: DenseDecoderLayer) -> LayerOperations:
    """Attention, then the feed-forward; nothing to overlap."""
    return _list(layer, layer.attention_prepare, layer.attention_core, layer.feed_forward)


def prefill_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """The order of DESIGN.md; a yield stands after each submit of communication. Also the straight forward's order."""
    return _list(
        layer,
        layer.attention_prepare,
        layer.attention_core,
        layer.gate,
        layer.dispatch_a,
        YieldOperation(),
        layer.dispatch_b,
        layer.experts,
        layer.combine_a,
        YieldOperation(),
        layer.shared_expert,
        layer.combine_b,
        layer.output,
    )


def decode_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """The shared expert under the dispatch. With the second micro-batch two stages behind, a dispatch runs beside shared experts
    and experts or attention, a combine beside attention or experts (of all cuts simulated, among those that left least unhidden).
    """
    return _list(
        layer,
        layer.attention_prepare,
        layer.attention_core,
        YieldOperation(),
        layer.gate,
        layer.dispatch_a,
        YieldOperation(),
        layer.shared_expert,
        layer.dispatch_b,
        layer.experts,
        layer.combine_a,
        YieldOperation(),
        layer.combine_b,
        layer.output,
    )


def single_batch_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """Overlap in one batch: the shared expert under the dispatch, the second half's down projection under the first's combine."""
    return _list(
        layer,
        layer.attention_prepare,
        layer.attention_core,
        layer.gate,
        layer.dispatch_a,
        layer.shared_expert,
        layer.dispatch_b,
        layer.gate_up,
        layer.down_first,
        layer.combine_a_first,
        layer.down_second,
        layer.combine_a_second,
        layer.combine_b,
        layer.output,
    )


@dataclass(frozen=True, kw_only=True)
class SplitOrder:
    """How two micro-batches share the sparse layers: each layer's list, and the strategy that its yields are for."""

    operations: Callable[[SparseDecoderLayer], LayerOperations]
    strategy: Strategy


PREFILL = SplitOrder(operations=prefill_operations, strategy=Strategy(name="prefill", yields_per_layer=2, delta_stages=0))
DECODE = SplitOrder(operations=decode_operations, strategy=Strategy(name="decode", yields_per_layer=3, delta_stages=2))


class Schedules:
    """The orders in which a step's operations may run: leading layers unsplit, then the sparse ones straight or two by two.

    `before` and `after`: what the model does before the first layer and after the last.
    """

    def __init__(
        self,
        layers: Sequence[DenseDecoderLayer | SparseDecoderLayer],
        *,
        before: Operation,
        after: Operation,
        single_batch_overlap: bool,
        prefill: SplitOrder = PREFILL,
        decode: SplitOrder = DECODE,
    ) -> None:
        dense = [each for layer in layers if isinstance(layer, DenseDecoderLayer) for each in dense_operations(layer)]
        sparse = [layer for layer in layers if isinstance(layer, SparseDecoderLayer)]
        straight = single_batch_operations if single_batch_overlap else prefill_operations
        self.leading = _straight([before, *dense])
        self.straight = _straight([each for layer in sparse for each in straight(layer)])
        self.closing = _straight([after])
        self._prefill = _lockstep(sparse, prefill) if sparse else self.straight
        self._decode = _lockstep(sparse, decode) if sparse else self.straight

    def operations(self) -> Iterator[Operation]:
        """All that any of the schedules runs; some come again."""
        for schedule in (self.leading, self.straight, self._prefill, self._decode, self.closing):
            for turn in schedule.turns:
                yield from turn.stage

    def split(self, *, extends: bool) -> Schedule:
        """Of two micro-batches; `extends`: some rank computes prompt tokens in this step."""
        return self._prefill if extends else self._decode


def _straight(operations: LayerOperations) -> Schedule:
    return Schedule.straight(cut_into_stages(operations))


def _lockstep(layers: Sequence[SparseDecoderLayer], order: SplitOrder) -> Schedule:
    stages = join_layers({layer.index: order.operations(layer) for layer in layers}, order.strategy)
    return Schedule.lockstep(stages, stages, delta_stages=order.strategy.delta_stages)


def _list(layer: DenseDecoderLayer | SparseDecoderLayer, *steps: Callable[[State], None] | YieldOperation) -> LayerOperations:
    blanks = blanks_of(layer)
    return [
        each if isinstance(each, YieldOperation) else Operation(each.__name__, each, layer.index, blanks.get(each.__name__))
        for each in steps
    ]
