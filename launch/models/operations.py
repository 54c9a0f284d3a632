"""A decoder layer as lists of operations with yield points, and the schedules made of them: straight, or two micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import Operation, State, YieldOperation
from moesaic.overlap.stages import Strategy, cut_into_stages, join_layers

if TYPE_CHECKING:
    from moesaic.launch.models.deepseek_v3 import DenseDecoderLayer, SparseDecoderLayer

LayerOperations = list[Operation | YieldOperation]


def dense_operations(layer: DenseDecoderLayer) -> LayerOperations:
    """Attention, then the feed-forward; nothing to overlap."""
    return [_op(layer.index, step) for step in (layer.attention_prepare, layer.attention_core, layer.feed_forward)]


def prefill_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """The order of DESIGN.md; a yield stands after each submit of communication. Also the straight forward's order."""
    return [
        _op(layer.index, layer.attention_prepare),
        _op(layer.index, layer.attention_core),
        _op(layer.index, layer.gate),
        _op(layer.index, layer.dispatch_a),
        YieldOperation(),
        _op(layer.index, layer.dispatch_b),
        _op(layer.index, layer.experts),
        _op(layer.index, layer.combine_a),
        YieldOperation(),
        _op(layer.index, layer.shared_expert),
        _op(layer.index, layer.combine_b),
        _op(layer.index, layer.output),
    ]


def decode_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """Finer stages, and the shared expert under the dispatch: a decode step's parts are short."""
    return [
        _op(layer.index, layer.attention_prepare),
        YieldOperation(),
        _op(layer.index, layer.attention_core),
        _op(layer.index, layer.gate),
        _op(layer.index, layer.dispatch_a),
        _op(layer.index, layer.shared_expert),
        YieldOperation(),
        _op(layer.index, layer.dispatch_b),
        _op(layer.index, layer.experts),
        _op(layer.index, layer.combine_a),
        YieldOperation(),
        _op(layer.index, layer.combine_b),
        _op(layer.index, layer.output),
    ]


PREFILL = Strategy(name="prefill", yields_per_layer=2, delta_stages=0)
DECODE = Strategy(name="decode", yields_per_layer=3, delta_stages=2)


class Schedules:
    """The orders in which a step's operations may run: leading layers unsplit, then the sparse ones straight or two by two."""

    def __init__(self, leading: Sequence[DenseDecoderLayer], sparse: Sequence[SparseDecoderLayer]) -> None:
        self.leading = Schedule.straight(cut_into_stages([each for layer in leading for each in dense_operations(layer)]))
        prefill = {layer.index: prefill_operations(layer) for layer in sparse}
        self.straight = Schedule.straight(cut_into_stages([each for operations in prefill.values() for each in operations]))
        self._prefill, self._decode = self.straight, self.straight
        if sparse:
            decode = {layer.index: decode_operations(layer) for layer in sparse}
            self._prefill = _lockstep(prefill, PREFILL)
            self._decode = _lockstep(decode, DECODE)

    def split(self, *, extends: bool) -> Schedule:
        """Of two micro-batches; `extends`: some rank computes prompt tokens in this step."""
        return self._prefill if extends else self._decode


def _lockstep(layers: dict[int, LayerOperations], strategy: Strategy) -> Schedule:
    stages = join_layers(layers, strategy)
    return Schedule.lockstep(stages, stages, delta_stages=strategy.delta_stages)


def _op(layer_index: int, method: Callable[[State], None]) -> Operation:
    return Operation(method.__name__, method, layer_index)
