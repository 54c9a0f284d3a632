"""What one rank process is told when it starts. Pickled by the launcher, read by `rank_process.run_rank`.

Knows no process and no socket. ZMQ: the HTTP process binds both endpoints and the rank connects; PUSH from the HTTP
process to this rank's own `to_rank_endpoint` (the rank PULLs), PUSH from every rank to the one `from_rank_endpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.config import ResolvedConfig
from moesaic.launch.topology import RankPlace, Topology
from moesaic.overlap.calibration import Layout, Profile

SPLIT_MODES = ("prefill", "decode")
"""The forward modes that have a threshold of their own for two-batch overlap, as in `step.SplitThresholds`."""


@dataclass(frozen=True, kw_only=True)
class ThresholdSource:
    """Where the thresholds of two-batch overlap come from: rank 0's `profile`; where it has none, all ranks measure.

    A measurement is filed under `layout` and `hardware`, and rank 0 writes it to `save_to` if that is given.
    """

    layout: Layout
    hardware: str
    profile: Profile | None = None
    save_to: str | None = None


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """What a rank of a prefill or decode instance is told. `instance`: unique per start of a server. `host`: where others reach
    this machine. `bootstrap_address`: host:port of the prefill instance's own bootstrap server, "" on decode. `timeout_s`: the
    longest that a room may wait for the other side. `checksum`: decode checks every page that it has fetched. `host_kv_gb`: host
    memory for the KV of retracted requests, 0 for none.
    """

    role: Literal["prefill", "decode"]
    instance: str
    model_id: str
    host: str
    backend: Literal["tcp", "nixl", "mooncake"]
    bootstrap_address: str = ""
    ib_device: str = ""
    num_reserved_decode_tokens: int = 0
    host_kv_gb: float = 0.0
    timeout_s: float = 120.0
    checksum: bool = False


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """`dist_init_method` is `file://path` or `tcp://host:port` (rank 0 hosts the store) for torch.distributed; deadline
    `config.dist_timeout`. `thresholds` is given where `config.two_batch_overlap` is on, `role` on a prefill or decode instance.
    """

    config: ResolvedConfig
    topology: Topology
    place: RankPlace
    dist_init_method: str
    to_rank_endpoint: str
    from_rank_endpoint: str
    slots: SlotOptions = field(default_factory=SlotOptions)
    rebalance: RebalanceSettings | None = None
    thresholds: ThresholdSource | None = None
    role: RoleSpec | None = None
