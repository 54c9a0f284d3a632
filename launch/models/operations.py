"""A decoder layer as a list of operations with yield points; the straight forward is this list, run straight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moesaic.overlap.operations import Operation, State, YieldOperation

if TYPE_CHECKING:
    from moesaic.launch.models.deepseek_v3 import DenseDecoderLayer, SparseDecoderLayer

LayerOperations = list[Operation | YieldOperation]


def dense_operations(layer: DenseDecoderLayer) -> LayerOperations:
    """Attention, then the feed-forward; nothing to overlap."""
    return [_op(layer.index, step) for step in (layer.attention_prepare, layer.attention_core, layer.feed_forward)]


def sparse_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """The order of DESIGN.md; a yield stands after each submit of communication."""
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


def _op(layer_index: int, method: Callable[[State], None]) -> Operation:
    return Operation(f"{method.__name__} of layer {layer_index}", method)
