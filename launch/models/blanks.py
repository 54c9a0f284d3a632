"""What an operation leaves behind when it fails: values of the right shapes that say nothing, so that the step goes on to its end.

A rank that stopped in the middle of a step would leave the others waiting in the next collective. So it goes on: every collective
is issued in its place and with its shapes, and only then the failure is raised. Operations that communicate have no blank: after
them nobody knows what the others have received. The latent KV that a failed step has written is not to be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from moesaic.launch.models.layers import DecoderLayer, DenseDecoderLayer, SparseDecoderLayer
from moesaic.moe.dispatcher import ExpertRows
from moesaic.overlap.operations import State

Blank = Callable[[State], None]


def blanks_of(layer: DenseDecoderLayer | SparseDecoderLayer) -> dict[str, Blank]:
    """Name of an operation of this layer -> its blank; those that communicate are not in it."""
    alone = layer.parts.group.size == 1
    blanks: dict[str, Blank] = {"attention_prepare": lambda state: _attention_prepare(layer, state)}
    if alone:
        blanks["attention_core"] = lambda state: _attention_core(layer, state)
    if isinstance(layer, SparseDecoderLayer):
        return blanks | _sparse(layer, alone)
    if alone or not layer.split:
        blanks["feed_forward"] = lambda state: state.replace("hidden", _rows(layer, state))
    return blanks


def _sparse(layer: SparseDecoderLayer, alone: bool) -> dict[str, Blank]:
    blanks: dict[str, Blank] = {
        "experts": lambda state: state.replace("expert_rows", _outputs(layer, state.peek("received").rows)),
        "gate_up": lambda state: _gate_up(layer, state),
        "down_first": lambda state: _down(layer, state, 0),
        "down_second": lambda state: _down(layer, state, 1),
    }
    if not layer.moe.replicas_communicate:
        blanks["gate"] = lambda state: _gate(layer, state)
    if alone or layer.scatter:
        blanks["shared_expert"] = lambda state: _shared_expert(layer, state)
    if not layer.scatter:
        blanks["output"] = lambda state: _output(layer, state)
    return blanks


def _attention_prepare(layer: DecoderLayer, state: State) -> None:
    state.discard("hidden")
    state.replace("queries", layer.parts.attention.blank_queries(_num_rows(state)))
    state.replace("residual", _rows(layer, state))


def _attention_core(layer: DecoderLayer, state: State) -> None:
    state.discard("queries")
    state.replace("hidden", _rows(layer, state))
    state.replace("residual", _rows(layer, state))


def _gate(layer: SparseDecoderLayer, state: State) -> None:
    hidden = _share(layer, state)
    state.replace("hidden", hidden)
    state.replace("topk", layer.moe.blank_topk(len(hidden), hidden.device))


def _gate_up(layer: SparseDecoderLayer, state: State) -> None:
    received = state.peek("received")
    rows: ExpertRows = received.rows
    inner = layer.parts.post_norm.new_zeros(*rows.hidden.shape[:-1], layer.moe.experts.inner_size)
    state.replace("inner", replace(rows, hidden=inner, scales=None))
    state.replace("halves", layer.moe.dispatcher.halve(received))


def _down(layer: SparseDecoderLayer, state: State, half: int) -> None:
    inner: ExpertRows = state.peek("halves")[half].pick(state.peek("inner"))
    state.replace("expert_rows", _outputs(layer, inner))


def _shared_expert(layer: SparseDecoderLayer, state: State) -> None:
    state.discard("hidden")
    state.replace("shared", _share(layer, state))


def _output(layer: SparseDecoderLayer, state: State) -> None:
    state.discard("shared")
    state.replace("hidden", _rows(layer, state))


def _outputs(layer: SparseDecoderLayer, rows: ExpertRows) -> Tensor:
    """In the model's dtype, whatever the rows came in."""
    norm = layer.parts.post_norm
    return norm.new_zeros(*rows.hidden.shape[:-1], norm.shape[0])


def _num_rows(state: State) -> int:
    return len(state.peek("inputs").input_ids)


def _rows(layer: DecoderLayer, state: State) -> Tensor:
    """Zero rows [T, H] of the DP group."""
    norm = layer.parts.post_norm
    return norm.new_zeros(_num_rows(state), norm.shape[0])


def _share(layer: SparseDecoderLayer, state: State) -> Tensor:
    """Zero rows of what this rank dispatches."""
    rows = _rows(layer, state)
    return layer.parts.group.scatter(rows) if layer.scatter else rows
