"""Moves one layer's expert weights between GPUs in small portions of work: into staging, checked, and only on `commit` into slots.

Knows wires, not process groups, and nothing of when to move. The weights of an expert are one slice of each of a layer's tensors
(values and their scales alike), which are laid out alike on all GPUs; they travel as bytes, with one checksum per tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from moesaic.eplb.moves import LayerMoves, Move
from moesaic.eplb.transfer import Exchange, Quarantine, TransferError, Wire, fresh_tag

_PIECE_BYTES = 1 << 18
_COLUMNS = 1024


class ChecksumError(TransferError):
    """Weights that did not arrive as they were sent."""


class Mover(Protocol):
    """What a transaction needs of one GPU's mover. `work` and `drain` return True when finished; `until` is on the clock."""

    def begin(self, cycle: int, layer: int, moves: LayerMoves) -> None: ...
    def work(self, until: float) -> bool: ...
    def drain(self, until: float) -> bool: ...
    def commit(self) -> None: ...
    def abandon(self) -> None: ...
    @property
    def waiting_for(self) -> int | None: ...
    @property
    def bytes_moved(self) -> int: ...
    def expert_bytes(self) -> int: ...


class WeightMover:
    """The mover of one GPU.

    layers: per sparse layer its tensors, [slots of this GPU, ...]. Staging holds at most the experts that one layer receives, is
    allocated once and grown when a layer needs more.
    """

    def __init__(
        self, *, layers: Sequence[Sequence[Tensor]], wire: Wire, quarantine: Quarantine, clock: Callable[[], float]
    ) -> None:
        self._layers = layers
        self._wire = wire
        self._quarantine = quarantine
        self._clock = clock
        self._staging: list[Tensor] = []
        self._exchange: Exchange | None = None
        self._steps: Iterator[bool] = iter(())
        self._draining = False
        self._bytes_moved = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes of weights that this GPU has received, ever."""
        return self._bytes_moved

    @property
    def waiting_for(self) -> int | None:
        """The GPU that the messages under way go to and come from."""
        if self._exchange is None:
            return None
        move = self._rounds[self._next_round][1][0]
        return move.source if move.destination == self._wire.rank else move.destination

    @property
    def staging_bytes(self) -> int:
        """Memory that staging takes now."""
        return sum(tensor.nbytes for tensor in self._staging)

    def expert_bytes(self) -> int:
        """Bytes of one expert of the largest layer."""
        return max((sum(tensor[0].nbytes for tensor in tensors) for tensors in self._layers), default=0)

    def begin(self, cycle: int, layer: int, moves: LayerMoves) -> None:
        """Take up a layer; the last one must have been committed, drained or abandoned."""
        rank = self._wire.rank
        self._cycle, self._layer = cycle, layer
        self._tensors = self._layers[layer]
        self._local = [move for move in moves.local_copies if move.destination == rank]
        self._rounds: list[tuple[int, list[Move]]] = []
        for index, in_round in enumerate(moves.rounds):
            if own := [move for move in in_round if rank in (move.source, move.destination)]:
                self._rounds.append((index, own))
        incoming = self._local + [move for _, moves in self._rounds for move in moves if move.destination == rank]
        self._rows = {move.expert: (row, move) for row, move in enumerate(incoming)}
        self._next_round = 0
        self._exchange = None
        self._draining = False
        self._steps = self._all_steps()

    def work(self, until: float) -> bool:
        """Copy, send, receive and check until the clock says `until` or only others can get on: True when all of it is done.

        Raises TransferError; after that only `drain` and `abandon` make sense.
        """
        return all(can_go_on and self._clock() < until for can_go_on in self._steps)

    def drain(self, until: float) -> bool:
        """After a failure anywhere: let every message of the layer happen, so that none is left under way; True when done."""
        if not self._draining:
            self._draining = True
            self._steps = self._all_steps()
        return self.work(until)

    def commit(self) -> None:
        """Copy what was staged into its slots. Does the same again when called again."""
        for row, move in self._rows.values():
            for tensor, staged in zip(self._tensors, self._staging, strict=True):
                for slot in move.slots:
                    _write(tensor[slot % len(tensor)], staged[row])

    def abandon(self) -> None:
        """Give the layer up; memory that a message may still write to is quarantined."""
        if self._exchange is not None:
            self._quarantine.add(self._exchange)
            self._exchange = None
            self._staging = []
        self._steps = iter(())

    def _all_steps(self) -> Iterator[bool]:
        """True: there is more to do now; False: others must get on first."""
        self._make_staging()
        if not self._draining:
            for move in self._local:
                yield from self._copy_local(move)
        while self._next_round < len(self._rounds):
            index, moves = self._rounds[self._next_round]
            yield from self._run_round(index, moves)
            self._exchange = None
            self._next_round += 1

    def _make_staging(self) -> None:
        sizes = [tensor[0].nbytes for tensor in self._tensors]
        if self._staging and [staged.shape[1] for staged in self._staging] != sizes:
            self._staging = []
        if not self._staging or len(self._staging[0]) < len(self._rows):
            self._staging = [
                torch.empty(len(self._rows), size, dtype=torch.uint8, device=tensor.device)
                for tensor, size in zip(self._tensors, sizes, strict=True)
            ]
            self._arrived_sums = torch.zeros(len(self._rows), len(sizes), dtype=torch.int64, device=self._tensors[0].device)

    def _copy_local(self, move: Move) -> Iterator[bool]:
        row, _ = self._rows[move.expert]
        for tensor, staged in zip(self._tensors, self._staging, strict=True):
            staged[row].copy_(_bytes_of(tensor[move.source_slot % len(tensor)]))
            yield True

    def _run_round(self, index: int, moves: list[Move]) -> Iterator[bool]:
        rank = self._wire.rank
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, Tensor]] = []
        for move in moves if self._exchange is None else []:
            if move.source == rank:
                parts = [_bytes_of(tensor[move.source_slot % len(tensor)]) for tensor in self._tensors]
                sums = torch.zeros(len(parts), dtype=torch.int64, device=parts[0].device)
                yield from self._sum_up(move.expert, parts, sums)
                sends += [(move.destination, part) for part in (*parts, sums)]
            else:
                row, _ = self._rows[move.expert]
                receives += [(move.source, staged[row]) for staged in self._staging]
                receives.append((move.source, self._arrived_sums[row]))
        if self._exchange is None:
            self._exchange = self._wire.post(sends, receives, fresh_tag(self._cycle, self._layer, index))
        while not self._exchange.done():
            yield False
        for move in moves:
            if move.destination == rank:
                yield from self._verify(move)

    def _verify(self, move: Move) -> Iterator[bool]:
        row, _ = self._rows[move.expert]
        sums = torch.zeros_like(self._arrived_sums[row])
        yield from self._sum_up(move.expert, [staged[row] for staged in self._staging], sums)
        if not self._draining and not torch.equal(sums, self._arrived_sums[row]):
            raise ChecksumError(
                f"expert {move.expert} of sparse layer {self._layer} did not arrive from GPU {move.source} as it was sent: "
                f"checksums {self._arrived_sums[row].tolist()} sent, {sums.tolist()} received"
            )
        self._bytes_moved += sum(staged.shape[1] for staged in self._staging)

    def _sum_up(self, expert: int, parts: Sequence[Tensor], sums: Tensor) -> Iterator[bool]:
        """Checksums of an expert's tensors into `sums`, a piece at a time; they also say which expert, layer, cycle and layout."""
        if self._draining:
            return
        for index, (part, tensor) in enumerate(zip(parts, self._tensors, strict=True)):
            layout = zlib.crc32(f"{tensor.dtype} {list(tensor.shape[1:])} {_order(tensor[0])}".encode())
            value: Tensor | int = (self._cycle << 40) + (self._layer << 20) + expert + (layout << 8) + index
            for first in range(0, len(part), _PIECE_BYTES):
                value = value * 31 + _checksum(part[first : first + _PIECE_BYTES])
                yield True
            sums[index] = value


def _order(weight: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    strides = weight.stride()
    return sorted(range(weight.dim()), key=lambda dim: (-strides[dim], dim))


def _bytes_of(weight: Tensor) -> Tensor:
    """One slot's bytes, uint8 [n]: in the order of memory where they lie together (not a copy), else packed."""
    together = weight.permute(_order(weight))
    dense = together if together.is_contiguous() else weight.contiguous()
    return dense.view(-1).view(torch.uint8)


def _write(weight: Tensor, data: Tensor) -> None:
    """The inverse of `_bytes_of`: uint8 [n] into one slot."""
    together = weight.permute(_order(weight))
    if together.is_contiguous():
        together.view(-1).view(torch.uint8).copy_(data)
    else:
        weight.copy_(data.view(weight.dtype).view(weight.shape))


def _checksum(data: Tensor) -> Tensor:
    """uint8 [n] -> int64 []: weighted sum of its words modulo 2^64. The weights are odd, so no change of a single word escapes."""
    if len(data) % 8 or data.data_ptr() % 8:
        padded = data.new_zeros(-(-len(data) // 8) * 8)
        padded[: len(data)] = data
        data = padded
    words = data.view(torch.int64)
    weights = _odd_numbers(data.device)
    whole = len(words) // _COLUMNS * _COLUMNS
    rest = words[whole:]
    columns = words[:whole].view(-1, _COLUMNS).sum(0)
    return (columns * weights).sum() + (rest * weights[: len(rest)]).sum()


@lru_cache
def _odd_numbers(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _COLUMNS, 2, dtype=torch.int64, device=device)
