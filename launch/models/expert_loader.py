"""Reads the routed experts of a rank's slots, one by one so that nothing is held twice: in the model's dtype, or in FP8 as stored.

Knows the checkpoint's names and the rank's part of each expert; not which experts, nor what computes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.quant import BLOCK, FP8
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.weights import Shard, WeightSource
from moesaic.moe.experts import ExpertWeights


class ExpertLoader:
    """Of one rank. `prefix` is the layer's, such as "model.layers.3.mlp"; `held` are the logical experts of its slots."""

    def __init__(
        self, config: ModelConfig, source: WeightSource, parallel: ParallelContext, *, dtype: torch.dtype, device: str
    ) -> None:
        self._source, self._dtype, self._device = source, dtype, device
        self._hidden, self._width = config.hidden_size, config.moe_intermediate_size
        self._rows, self._columns = (Shard(dim, parallel.moe_tp_rank, parallel.moe_tp_size) for dim in (0, 1))
        self._part = self._width // parallel.moe_tp_size

    def plain(self, prefix: str, held: list[int], *, out_fastest: bool) -> ExpertWeights:
        """`out_fastest`: in memory the outputs run fastest; few rows times such a weight is up to a third faster on CPU."""
        hidden, width, part = self._hidden, self._width, self._part
        gate_up = self._empty(len(held), 2 * part, hidden, out_fastest)
        down = self._empty(len(held), hidden, part, out_fastest)
        for local, expert in enumerate(held):
            name = f"{prefix}.experts.{expert}"
            gate_up[local, :part] = self._tensor(f"{name}.gate_proj.weight", width, hidden, shard=self._rows)
            gate_up[local, part:] = self._tensor(f"{name}.up_proj.weight", width, hidden, shard=self._rows)
            down[local] = self._tensor(f"{name}.down_proj.weight", hidden, width, shard=self._columns)
        return ExpertWeights(gate_up=gate_up, down=down)

    def fp8(self, prefix: str, held: list[int]) -> ExpertWeights:
        """With the scales of their blocks. An expert whose width ends inside a block is filled up with zeros to whole blocks, so
        that up begins a block: zeros give zeros, and change no scale. Raises ValueError for a cut inside a block.
        """
        hidden, width, part = self._hidden, self._width, self._part
        if part < width and part % BLOCK:
            raise ValueError(f"FP8 experts: this rank's part of an expert is {part} wide, wanted a multiple of {BLOCK}")
        room = -(-part // BLOCK) * BLOCK
        gate_up, gate_up_scales = self._zero_fp8(len(held), 2 * room, hidden)
        down, down_scales = self._zero_fp8(len(held), hidden, room)
        for local, expert in enumerate(held):
            name = f"{prefix}.experts.{expert}"
            for index, half in enumerate(("gate_proj", "up_proj")):
                values, scales = self._source.quantized(f"{name}.{half}.weight", (width, hidden), self._rows)
                gate_up[local, index * room : index * room + part] = values
                gate_up_scales[local, index * room // BLOCK : (index + 1) * room // BLOCK] = scales
            values, scales = self._source.quantized(f"{name}.down_proj.weight", (hidden, width), self._columns)
            down[local, :, :part], down_scales[local] = values, scales
        return ExpertWeights(gate_up=gate_up, down=down, gate_up_scales=gate_up_scales, down_scales=down_scales)

    def _tensor(self, name: str, *shape: int, shard: Shard) -> Tensor:
        return self._source.tensor(name, shape, self._dtype, shard)

    def _empty(self, num_experts: int, rows: int, columns: int, out_fastest: bool) -> Tensor:
        """Uninitialised [E, rows, columns]."""
        if not out_fastest:
            return torch.empty(num_experts, rows, columns, dtype=self._dtype, device=self._device)
        return torch.empty(num_experts, columns, rows, dtype=self._dtype, device=self._device).transpose(1, 2)

    def _zero_fp8(self, num_experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """e4m3 [E, rows, columns] and room for the scales of its blocks."""
        blocks = (num_experts, -(-rows // BLOCK), -(-columns // BLOCK))
        values = torch.zeros(num_experts, rows, columns, dtype=torch.uint8, device=self._device).view(FP8)
        return values, torch.empty(blocks, dtype=torch.float32, device=self._device)
