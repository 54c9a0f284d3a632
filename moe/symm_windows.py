"""Memory that the ranks of a node write to each other: made over torch's symmetric memory, taken in turn by the layers of a model.

Knows the exchange's layout (kernels/peer_exchange.py), not what is exchanged. One window serves one exchange at a time, from its
dispatch to its combine; two micro-batches in turns need two. Not run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.peer_exchange import OPERATIONS, PeerLate, PeerLayout, PeerWindow
from moesaic.moe.dispatch_mode import DispatchMode

NUM_WINDOWS = 2
MEETING_S = 60
MakeWindows = Callable[[PeerLayout, int, dist.ProcessGroup | None, str], Sequence[PeerWindow]]
"""(layout, this rank, its group, its device) -> its windows; collective."""


class NoPeerMemoryError(RuntimeError):
    """The ranks can't write each other's memory; says why and what to do."""


def symmetric_windows(layout: PeerLayout, rank: int, group: dist.ProcessGroup | None, device: str) -> list[PeerWindow]:
    """`NUM_WINDOWS` windows in symmetric memory; a group of one rank has them in its own. Collective.

    Raises NoPeerMemoryError.
    """
    if torch.device(device).type != "cuda":
        raise NoPeerMemoryError(f"--moe-a2a-backend symm: the device is {device}, and only CUDA devices share memory; use torch")
    num_bytes = NUM_WINDOWS * layout.num_bytes
    if group is None:
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        return windows_in(memory, layout, rank, [memory.data_ptr()])
    try:
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(num_bytes, dtype=torch.uint8, device=torch.device(device)).zero_()
        handle: Any = symmetric.rendezvous(memory, _meeting_group(group))
    except (ImportError, RuntimeError) as error:
        raise NoPeerMemoryError(
            f"--moe-a2a-backend symm: {num_bytes} bytes of symmetric memory can't be had: {error}; all ranks must be on one node "
            "whose GPUs reach each other (nvidia-smi topo -p2p w); else use --moe-a2a-backend torch"
        ) from error
    torch.cuda.synchronize(device)
    dist.barrier(group)  # nobody writes before everybody's zeros are there
    return windows_in(memory, layout, rank, [address + handle.offset for address in handle.buffer_ptrs])


def _meeting_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Where torch's symmetric memory finds the ranks' store: `group`, but for one written in Python, which has none that C++ sees.

    Then it is a new group of the same ranks. Collective.
    """
    if type(group) is dist.ProcessGroup:
        return group
    meeting: dist.ProcessGroup = dist.new_group(
        dist.get_process_group_ranks(group), backend="gloo", timeout=timedelta(seconds=MEETING_S), use_local_synchronization=True
    )
    return meeting


def windows_in(memory: Tensor, layout: PeerLayout, rank: int, addresses: Sequence[int]) -> list[PeerWindow]:
    """memory uint8, zeros, windows one after the other; addresses: where this rank sees the memory of each rank."""
    words = torch.zeros(NUM_WINDOWS, 3, dtype=torch.int32, device=memory.device)
    starts = torch.tensor(addresses, dtype=torch.int64, device=memory.device)
    return [
        PeerWindow(
            layout=layout,
            rank=rank,
            own=memory[index * layout.num_bytes : (index + 1) * layout.num_bytes],
            peers=starts + index * layout.num_bytes,
            step=words[index, :1],
            late=words[index, 1:],
        )
        for index in range(NUM_WINDOWS)
    ]


class WindowsInTurn:
    """The windows of one rank, shared by the layers of a model. All ranks take and return them in the same order."""

    def __init__(self, windows: Sequence[PeerWindow]) -> None:
        self._all, self._free = tuple(windows), list(windows)
        pinned = windows[0].own.is_cuda
        self._seen = {id(window): torch.zeros(2, dtype=torch.int32, pin_memory=pinned) for window in windows}

    def take(self) -> PeerWindow:
        """The next free window, until it is returned. Raises PeerLate if a rank missed the exchange that was its last."""
        assert self._free, "more micro-batches are under way than there are windows"
        self._raise_if_late(self._free[0])
        return self._free.pop(0)

    def enter(self, mode: DispatchMode) -> None:
        """Every mode finds the windows as it needs them."""

    def leave(self) -> None:
        """What there is to ask was asked when the windows were given back."""

    def verify(self) -> None:
        """Once the device has been waited for: raises PeerLate if a rank missed an exchange of the steps so far."""
        for window in self._all:
            self._raise_if_late(window)

    def give_back(self, window: PeerWindow) -> None:
        """After its combine. A CPU knows at once whether all ranks came; a device is asked without a wait, for `take` to see."""
        self._seen[id(window)].copy_(window.late, non_blocking=True)
        if not window.own.is_cuda:
            self._raise_if_late(window)
        self._free.append(window)

    def _raise_if_late(self, window: PeerWindow) -> None:
        for operation, rank in zip(OPERATIONS, self._seen[id(window)].tolist(), strict=True):
            if rank:
                raise PeerLate(rank - 1, operation)
