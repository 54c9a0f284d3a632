"""Where the routed experts lie when a server starts, and whether they move: from the flags to what the ranks are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from moesaic.eplb.algorithm import place_experts
from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.location_file import load_location
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import Conflict
from moesaic.launch.errors import ConfigError
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.report import Choice
from moesaic.launch.topology import ModelShape, Topology


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """`slots`: what is loaded where, and how replicas are chosen. `rebalance` None: experts stay where they are."""

    slots: SlotOptions
    rebalance: RebalanceSettings | None

    @property
    def digest(self) -> str:
        """Equal on nodes that load the same experts into the same slots."""
        location = self.slots.location
        return "trivial" if location is None else sha256(location.physical_to_logical.tobytes()).hexdigest()[:16]

    def choice(self) -> Choice:
        """The row of the resolution report."""
        location, rebalance = self.slots.location, self.rebalance
        chosen = "one slot per expert, fixed"
        if location is not None:
            redundant = location.num_slots - location.num_experts
            chosen = f"{location.num_slots} slots a layer ({redundant} redundant), replicas chosen {self.slots.replica_choice}"
        if rebalance is not None and rebalance.moves:
            chosen += f"; rebalanced every {rebalance.config.num_iterations} forwards by '{rebalance.algorithm}'"
        elif rebalance is not None:
            chosen += f"; balancedness reported every {rebalance.config.num_iterations} forwards"
        return Choice(capability="expert placement", chosen=chosen)


def plan_experts(config: ServerConfig, model: ModelConfig, topology: Topology) -> ExpertPlan:
    """Raises ConfigError naming the flag and, for a bad file, its field, layer or expert."""
    rebalance = _rebalance_settings(config)
    movable = rebalance is not None and rebalance.moves
    asked = config.ep_num_redundant_experts or config.init_expert_location != "trivial" or rebalance is not None
    if not asked or not model.sparse_layers:
        return ExpertPlan(slots=SlotOptions(), rebalance=None)
    num_slots = model.n_routed_experts + config.ep_num_redundant_experts
    location = ExpertLocation.trivial(
        num_layers=len(model.sparse_layers),
        num_experts=model.n_routed_experts,
        num_slots=num_slots,
        ep_size=topology.ep_size,
        num_nodes=topology.nnodes,
    )
    if config.init_expert_location != "trivial":
        location = _initial_location(config, model, location)
    slots = SlotOptions(location=location, replica_choice=config.ep_dispatch_algorithm or "static", movable=movable)
    return ExpertPlan(slots=slots, rebalance=rebalance)


def _initial_location(config: ServerConfig, model: ModelConfig, trivial: ExpertLocation) -> ExpertLocation:
    """What --init-expert-location describes, in the slots of `trivial`."""

    def solve(counts: Int64Array) -> Int64Array:
        wanted = place_experts(
            counts,
            num_slots=trivial.num_slots,
            ep_size=trivial.ep_size,
            num_nodes=trivial.num_nodes,
            num_groups=model.n_group,
            algorithm=config.eplb_algorithm,
        )
        return wanted.physical_to_logical

    try:
        return load_location(
            config.init_expert_location,
            num_layers=trivial.num_layers,
            num_experts=trivial.num_experts,
            num_slots=trivial.num_slots,
            ep_size=trivial.ep_size,
            num_nodes=trivial.num_nodes,
            layer_ids=model.sparse_layers,
            solve=solve,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"--init-expert-location: {error}") from error


def _rebalance_settings(config: ServerConfig) -> RebalanceSettings | None:
    if not config.enable_eplb and config.expert_balancedness_report_mode == "off":
        return None
    try:
        settings = RebalanceConfig(
            num_iterations=config.eplb_rebalance_num_iterations,
            layers_per_chunk=config.eplb_rebalance_layers_per_chunk,
            min_utilization=config.eplb_min_rebalancing_utilization_threshold,
        )
    except ValueError as error:
        raise ConfigError(f"EPLB: {error}") from error
    return RebalanceSettings(config=settings, algorithm=config.eplb_algorithm, moves=config.enable_eplb)


def placement_conflicts(config: ServerConfig, shape: ModelShape, topology: Topology) -> Iterator[Conflict]:
    """Numbers of slots that the layout doesn't divide, and movement where there is nowhere to move."""
    num_slots, ep = shape.num_experts + config.ep_num_redundant_experts, topology.ep_size
    redundant = config.ep_num_redundant_experts
    if redundant and num_slots % ep:
        fitting = redundant + -num_slots % ep
        yield Conflict(
            flags=f"--ep-num-redundant-experts {redundant}",
            reason=f"{shape.num_experts} experts and {redundant} replicas can't be dealt evenly to {ep} expert-parallel ranks",
            remedy=f"--ep-num-redundant-experts {fitting}",
        )
    watched = config.enable_eplb or config.expert_balancedness_report_mode != "off"
    flag = "--enable-eplb" if config.enable_eplb else "--expert-balancedness-report-mode"
    if watched and (ep == 1 or topology.moe_tp_size > 1):
        yield Conflict(
            flags=f"{flag} with {ep} expert-parallel ranks of {topology.world_size}",
            reason="experts are balanced among ranks that each hold whole experts, two or more",
            remedy="--moe-a2a-backend torch, or --ep-size equal to --tp-size, of 2 or more",
        )
    if config.ep_dispatch_algorithm in {"balanced", "activated"} and not redundant:
        yield Conflict(
            flags=f"--ep-dispatch-algorithm {config.ep_dispatch_algorithm} without redundant experts",
            reason="there is nothing to choose where every expert has one slot, and the choice costs a message per layer",
            remedy="add --ep-num-redundant-experts, or drop --ep-dispatch-algorithm",
        )
