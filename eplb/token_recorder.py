"""Records which logical experts every single token of this rank chose ('per_token' mode), and the .npz file it travels in.

For studies of routing, and for replaying real batches through other placements and replica choices. Knows one rank; step ids line
ranks up, since they step together. Memory is bounded: a ring of the last tokens; how many older ones it dropped is told. Cost: one
comparison per layer when off; when on, a narrow copy of the ids per layer without a wait, and one copy to the host per step, which
waits for the device. The ids are taken by Python calls, so steps replayed from a captured graph are not seen.

An example: 58 sparse layers x top-8 in int16 and two numbers make 944 bytes a token; 64 MiB hold the last 71,000 tokens.

    file field  what                                                   (rows are tokens, oldest first)
    topk_ids    int16 or int32 [num_layers, num_tokens, top_k], logical, -1 = none
    step_ids    int64 [num_tokens], counted from the start of the recording
    positions   int64 [num_tokens], of the token in its sequence; -1 = not told
    layer_ids   int32 [num_layers], ascending model layer numbers
    num_experts, num_dropped, model, domain
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.eplb.array_file import read_fields
from moesaic.eplb.load_record import BadLoadRecord


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """The choices of single tokens; fields as in the file (see the module's text)."""

    topk_ids: NDArray[np.signedinteger[Any]]
    step_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    layer_ids: NDArray[np.int32]
    num_experts: int
    num_dropped: int = 0
    model: str = ""
    domain: str = ""

    def save(self, path: str | Path) -> None:
        """Write .npz. Raises BadLoadRecord for another ending."""
        if Path(path).suffix != ".npz":
            raise BadLoadRecord(f"{path}: the name must end in .npz (choices of single tokens have no .pt form)")
        fields: dict[str, Any] = dict(vars(self))
        np.savez_compressed(path, **fields)


def load_tokens(path: str | Path) -> TokenRecord:
    """Read what TokenRecord.save wrote. Raises BadLoadRecord naming the file and field."""
    path = Path(path)
    if path.suffix != ".npz":
        raise BadLoadRecord(f"{path}: expected a .npz file")
    fields = read_fields(path, BadLoadRecord)
    for name in ("topk_ids", "step_ids", "positions", "layer_ids", "num_experts", "num_dropped"):
        if name not in fields:
            raise BadLoadRecord(f"{path}: field '{name}' is missing; there are {sorted(fields)}")
        if fields[name].dtype.kind != "i":
            raise BadLoadRecord(f"{path}: field '{name}' must hold integers, got {fields[name].dtype}")
    record = TokenRecord(
        topk_ids=fields["topk_ids"],
        step_ids=fields["step_ids"],
        positions=fields["positions"],
        layer_ids=fields["layer_ids"],
        num_experts=int(fields["num_experts"]),
        num_dropped=int(fields["num_dropped"]),
        model=str(fields.get("model", "")),
        domain=str(fields.get("domain", "")),
    )
    _check(path, record)
    return record


def _check(path: Path, record: TokenRecord) -> None:
    ids = record.topk_ids
    if ids.ndim != 3 or len(ids) != len(record.layer_ids):
        expected = f"[{len(record.layer_ids)} layers, num_tokens, top_k]"
        raise BadLoadRecord(f"{path}: field 'topk_ids' must have shape {expected}, got {list(ids.shape)}")
    for name in ("step_ids", "positions"):
        if getattr(record, name).shape != (ids.shape[1],):
            raise BadLoadRecord(f"{path}: field '{name}' must be {ids.shape[1]} numbers, one per token")
    if ids.size and (ids.min() < -1 or ids.max() >= record.num_experts):
        layer, token, choice = np.argwhere((ids < -1) | (ids >= record.num_experts))[0].tolist()
        where = f"token {token} of layer {record.layer_ids[layer]}"
        raise BadLoadRecord(
            f"{path}: field 'topk_ids' holds expert {ids[layer, token, choice]} for {where}, but there are {record.num_experts}"
        )


class ExpertTokenRecorder:
    """Off until `start`. Per step: `record` for every sparse layer (and micro-batch, in the same order), then `end_step` once."""

    def __init__(self, *, layer_ids: Sequence[int], num_experts: int, top_k: int, max_bytes: int = 64 << 20) -> None:
        """`layer_ids`: the model's sparse layers, ascending; `num_experts`: logical, without redundant ones.

        The ring holds at most `max_bytes` bytes of host memory. Raises ValueError when that is not one token.
        """
        self._dtype = torch.int16 if num_experts < 2**15 else torch.int32
        token_bytes = len(layer_ids) * top_k * self._dtype.itemsize + 16
        self.max_tokens = max_bytes // token_bytes
        if self.max_tokens < 1 or not len(layer_ids) or num_experts < 1 or top_k < 1:
            raise ValueError(
                f"the token recorder needs at least one layer, expert, choice and token: got {len(layer_ids)} layers, "
                f"{num_experts} experts, top_k {top_k}, max_bytes {max_bytes} (one token takes {token_bytes} bytes)"
            )
        self.layer_ids = np.asarray(layer_ids, dtype=np.int32)
        self.num_experts = num_experts
        self.is_recording = False
        numpy_dtype = np.int16 if self._dtype == torch.int16 else np.int32
        # Token number i is row i % max_tokens. Pages of the ring become real memory when they are first written.
        self._ids = np.empty((self.max_tokens, len(layer_ids), top_k), dtype=numpy_dtype)
        self._step_ids = np.empty(self.max_tokens, dtype=np.int64)
        self._positions = np.empty(self.max_tokens, dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._open: list[list[Tensor]] = [[] for _ in self.layer_ids]
        self._num_steps = 0
        self._num_seen = 0

    def start(self) -> None:
        """Begin a new recording: forgets the last one."""
        self.reset()
        self.is_recording = True

    def stop(self) -> None:
        """Record no more; what was recorded stays until `reset` or `start`."""
        self.is_recording = False

    @property
    def observer(self) -> Callable[[int, Tensor], None] | None:
        """`record`; None while off."""
        return self.record if self.is_recording else None

    def record(self, layer_index: int, topk_ids: Tensor) -> None:
        """Keep one layer's choices: int64 [T, K], logical, -1 for none."""
        if self.is_recording:
            self._open[layer_index].append(topk_ids.to(self._dtype))

    def end_step(self, positions: Tensor | None = None) -> None:
        """Close the step. `positions` int64 [T]: of its rows in their sequences. Rows without any choice (padding) are left out."""
        if not self.is_recording:
            return
        if any(self._open):
            ids = torch.stack([torch.cat(chunks) for chunks in self._open], dim=1).cpu().numpy()
            where = np.full(len(ids), -1) if positions is None else positions.cpu().numpy()
            assert len(where) == len(ids), f"{len(where)} positions for {len(ids)} rows"
            is_real = (ids >= 0).any(axis=(1, 2))
            self._keep(ids[is_real], where[is_real])
            self._open = [[] for _ in self.layer_ids]
        self._num_steps += 1

    def snapshot(self, *, model: str = "", domain: str = "") -> TokenRecord:
        """What this rank has recorded in closed steps, oldest token first; may have 0 tokens."""
        num_dropped = max(0, self._num_seen - self.max_tokens)
        rows = np.arange(num_dropped, self._num_seen) % self.max_tokens
        return TokenRecord(
            topk_ids=np.ascontiguousarray(self._ids[rows].transpose(1, 0, 2)),
            step_ids=self._step_ids[rows],
            positions=self._positions[rows],
            layer_ids=self.layer_ids,
            num_experts=self.num_experts,
            num_dropped=num_dropped,
            model=model,
            domain=domain,
        )

    def dump(self, path: str | Path, *, model: str = "", domain: str = "") -> TokenRecord:
        """Write this rank's snapshot to `path` (.npz) and return it."""
        record = self.snapshot(model=model, domain=domain)
        record.save(path)
        return record

    def _keep(self, ids: NDArray[np.signedinteger[Any]], positions: NDArray[np.int64]) -> None:
        """ids [T, num_layers, K] and positions [T] of the step's real tokens into the ring."""
        self._num_seen += len(ids)
        num_kept = min(len(ids), self.max_tokens)
        rows = np.arange(self._num_seen - num_kept, self._num_seen) % self.max_tokens
        self._ids[rows] = ids[len(ids) - num_kept :]
        self._positions[rows] = positions[len(ids) - num_kept :]
        self._step_ids[rows] = self._num_steps
