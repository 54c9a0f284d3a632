"""Makes the rooms of a rank of an instance with a role: its memory, transfer backend, end of the protocol, and queues."""

from __future__ import annotations

import torch.distributed as dist

from moesaic.launch.disaggregation.backends import make_backend
from moesaic.launch.disaggregation.bootstrap import registration
from moesaic.launch.disaggregation.bootstrap_client import register_rank
from moesaic.launch.disaggregation.decode_rooms import DecodeRooms
from moesaic.launch.disaggregation.directory import DecodeRank
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.prefill_rooms import PrefillRooms
from moesaic.launch.disaggregation.protocol import Deadlines, KVLayout
from moesaic.launch.disaggregation.receiver import DecodeTransfer
from moesaic.launch.disaggregation.sender import PrefillTransfer
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.rank_spec import RankSpec, RoleSpec
from moesaic.launch.engine.rooms import Rooms


def attach_rooms(spec: RankSpec, engine: RankEngine) -> Rooms:
    """The engine's KV pool is there. A prefill rank has registered when this returns. Collective.

    Raises LayoutMismatchError when the bootstrap server refuses this rank, BootstrapError when it is not reached, ValueError when
    the backend can't be had.
    """
    role = spec.role
    assert role is not None, "instances without a role have no rooms"
    memory = PagedMemory.from_tensors(engine.runner.kv_pages())
    backend = make_backend(role.backend, memory, host=role.host, ib_device=role.ib_device)
    instance, layout, deadlines = _common_name(role, engine), kv_layout(spec, engine), room_deadlines(role.timeout_s)
    if role.role == "decode":
        who = DecodeRank(instance=instance, rank=spec.place.rank, layout=layout)
        receiving = DecodeTransfer(rank=who, memory=memory, backend=backend, deadlines=deadlines, checksum=role.checksum)
        return DecodeRooms(receiving, engine.scheduler, engine.results)
    sending = PrefillTransfer(
        instance=instance,
        rank=spec.place.rank,
        layout=layout,
        memory=memory,
        backend=backend,
        host=role.host,
        deadlines=deadlines,
    )
    place = spec.place
    own = registration(layout, instance=instance, dp_rank=place.dp_rank, attn_tp_rank=place.attn_tp_rank, address=sending.address)
    register_rank(role.bootstrap_address, own)
    return PrefillRooms(sending, engine.scheduler, engine.results)


def kv_layout(spec: RankSpec, engine: RankEngine) -> KVLayout:
    """What the other side must know of this instance's KV."""
    assert spec.role is not None
    topology, runner = spec.topology, engine.runner
    return KVLayout(
        model_id=spec.role.model_id,
        tp_size=topology.world_size,
        dp_size=topology.dp_size,
        ep_size=topology.ep_size,
        page_size=spec.config.page_size,
        kv_dtype=spec.config.kv_dtype,
        bytes_per_token=runner.kv_bytes_per_token,
        num_layers=runner.model_config.num_hidden_layers,
    )


def room_deadlines(timeout_s: float) -> Deadlines:
    """Waiting for pages takes longest: the other side may be computing, or short of memory, for others first."""
    return Deadlines(bootstrapping=timeout_s, waiting=2.5 * timeout_s, transferring=timeout_s / 2)


def _common_name(role: RoleSpec, engine: RankEngine) -> str:
    """Rank 0's name for the instance: each node's launcher has made one."""
    parallel = engine.runner.parallel
    if parallel.world_size == 1:
        return role.instance
    names: list[str] = [role.instance]
    dist.broadcast_object_list(names, src=0, group=parallel.world_group)
    return names[0]
