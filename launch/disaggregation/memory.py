"""A rank's paged KV as a transfer backend sees it: addresses, bytes of a run of pages, checksums.

Knows no model. Layer l's pages lie one after the other; a run of pages is one piece of memory per layer. The memory belongs to
somebody else, who keeps it alive.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.layout import PageRun

if TYPE_CHECKING:
    from torch import Tensor

ByteArray = npt.NDArray[np.uint8]
Uint64Array = npt.NDArray[np.uint64]


class PagedMemory:
    """`addresses[l]`: where layer l's page 0 begins. `layer_page_bytes`: one page of one layer. `device_index` None: CPU memory."""

    def __init__(self, layers: Sequence[ByteArray]) -> None:
        """CPU memory, one array [num_pages, layer_page_bytes] per layer. Raises ValueError unless they are alike and contiguous."""
        shapes = {layer.shape for layer in layers}
        if len(shapes) != 1 or any(not layer.flags.c_contiguous or layer.ndim != 2 for layer in layers):
            raise ValueError(f"the layers' pages must be contiguous matrices of one shape, got {sorted(shapes)}")
        self.num_layers = len(layers)
        self.num_pages, self.layer_page_bytes = int(layers[0].shape[0]), int(layers[0].shape[1])
        self.addresses = [int(layer.ctypes.data) for layer in layers]
        self.device_index: int | None = None
        self._layers = list(layers)

    @classmethod
    def from_tensors(cls, layers: Sequence[Tensor]) -> PagedMemory:
        """Tensors [num_pages, elements of a page], one per layer (`LatentKVPool.pages`). Raises ValueError as above."""
        import torch

        if layers[0].device.type == "cpu":
            return cls([layer.view(torch.uint8).numpy() for layer in layers])
        memory = cls([np.empty((layer.shape[0], 0), dtype=np.uint8) for layer in layers])
        memory.layer_page_bytes = layers[0].stride(0) * layers[0].element_size()
        memory.addresses = [layer.data_ptr() for layer in layers]
        memory.device_index = layers[0].device.index
        return memory

    @property
    def page_bytes(self) -> int:
        """One page of all layers."""
        return self.num_layers * self.layer_page_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_pages * self.layer_page_bytes

    def check_run(self, first: int, num_pages: int) -> None:
        """Raises ValueError for pages that this memory does not have."""
        if first < 0 or num_pages < 1 or first + num_pages > self.num_pages:
            raise ValueError(f"pages {first}..{first + num_pages - 1} are not all in [0, {self.num_pages})")

    def views(self, first: int, num_pages: int) -> list[memoryview]:
        """The bytes of a run of pages, one piece per layer, without a copy. CPU memory only."""
        assert self.device_index is None, "pages of a GPU have no bytes here"
        self.check_run(first, num_pages)
        return [layer[first : first + num_pages].data.cast("B") for layer in self._layers]

    def checksum(self, page: int) -> int:
        """CRC-32 of a page, layer after layer. CPU memory only."""
        value = 0
        for view in self.views(page, 1):
            value = zlib.crc32(view, value)
        return value


class RemoteMemory(msgspec.Struct, frozen=True):
    """Another rank's paged KV, for transports that read by address. `kind` is DRAM or VRAM, `device` the GPU's index."""

    addresses: list[int]
    layer_page_bytes: int
    num_pages: int
    kind: str
    device: int

    @staticmethod
    def of(memory: PagedMemory) -> RemoteMemory:
        kind = "DRAM" if memory.device_index is None else "VRAM"
        return RemoteMemory(memory.addresses, memory.layer_page_bytes, memory.num_pages, kind, memory.device_index or 0)

    def check_like(self, memory: PagedMemory, peer: str) -> None:
        """Raises ValueError with both values when a page there is not as large as a page here."""
        there, here = (len(self.addresses), self.layer_page_bytes), (memory.num_layers, memory.layer_page_bytes)
        if there != here:
            raise ValueError(f"{peer} has {there[0]} layers with pages of {there[1]} bytes, this rank {here[0]} with {here[1]}")


def run_pieces(memory: PagedMemory, remote: RemoteMemory, runs: Sequence[PageRun]) -> Uint64Array:
    """Runs as pieces of memory: uint64 [num_layers * len(runs), 3] of own address, remote address, bytes.

    Raises ValueError for pages that one of the two does not have.
    """
    rows = np.array([(run.target, run.source, run.num_pages) for run in runs], dtype=np.uint64)
    for run in runs:
        memory.check_run(run.target, run.num_pages)
        if run.source < 0 or run.source + run.num_pages > remote.num_pages:
            raise ValueError(f"pages {run.source}..{run.source + run.num_pages - 1} are not all in [0, {remote.num_pages})")
    scaled = rows * np.uint64(memory.layer_page_bytes)
    bases = np.array([memory.addresses, remote.addresses, [0] * memory.num_layers], dtype=np.uint64).T
    return (bases[:, None, :] + scaled[None, :, :]).reshape(-1, 3)
