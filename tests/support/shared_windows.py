"""Windows that processes of one machine write to each other: files in memory, mapped by all. For the peer exchange on CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import interpreter  # noqa: F401  before anything that imports Triton
import torch
import torch.distributed as dist

from moesaic.kernels.peer_exchange import PeerLayout, PeerWindow
from moesaic.moe.symm_windows import NUM_WINDOWS, windows_in


@dataclass(frozen=True, kw_only=True)
class SharedWindow(PeerWindow):
    """Keeps the other ranks' memory mapped."""

    all_memory: tuple[torch.Tensor, ...]


def shared_windows(
    layout: PeerLayout, rank: int, group: dist.ProcessGroup | None, device: str, *, most_polls: int = 400_000
) -> list[PeerWindow]:
    """As `symm_windows.symmetric_windows`, on CPU. In the interpreter a poll takes some 0.1 ms."""
    num_bytes, folder = NUM_WINDOWS * layout.num_bytes, Path("/dev/shm")
    names = [folder / f"moesaic-{os.getppid()}-{peer}" for peer in range(layout.num_ranks)]
    names[rank].write_bytes(bytes(num_bytes))
    if group is not None:
        dist.barrier(group)
    memory = [torch.from_file(str(name), shared=True, size=num_bytes, dtype=torch.uint8) for name in names]
    if group is not None:
        dist.barrier(group)
    names[rank].unlink()
    windows = windows_in(memory[rank], layout, rank, [x.data_ptr() for x in memory])
    return [SharedWindow(**{**vars(window), "most_polls": most_polls, "all_memory": tuple(memory)}) for window in windows]
