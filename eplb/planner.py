"""What-if: which EP size, how many redundant experts, which algorithm and how often, judged by a recorded load.

Knows a load record, no server; `replay.py` says how one setting is judged. A sweep is slices, not a
product: EP size x redundant experts first, then the policies and the intervals at the recommended point. Slots have to divide among
the GPUs, so E + redundant experts is rounded up, without EPLB too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moesaic.eplb.bounds import gap
from moesaic.eplb.load_record import LoadRecord
from moesaic.eplb.replay import Cluster, PlanPoint, Replay
from moesaic.eplb.report import BadReport, merge_windows
from moesaic.eplb.words import counted, size

MAX_WINDOWS = 32
"""A longer record is merged into so many windows at most, which bounds the time a sweep takes."""
MAX_GPUS = 1000
DEFAULT_EP_SIZES = (8, 16, 24, 32, 40, 48, 64, 72, 96, 128, 144, 192, 256, 320)
_SWEEP_MOVES = 3
_LARGEST_PROBE = 72
"""GPUs at which intervals are compared at most: they take the most solves, and those of a thousand GPUs take seconds."""
_CLOSE = 0.99
"""A setting that reaches this part of the best figure counts as equally good: the rest is noise of the load."""
_WORTH_MOVING = 0.97
"""What moves less weight is taken although it only reaches this part of the best figure: the last few percent don't pay."""
_SIMILAR_BYTES = 0.9


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to sweep.

    expert_bytes: weights and scales of one expert of one layer. ep_size: the one to recommend for, else chosen. algorithms:
    different ones; the first is that of the slices over EP size and slots. redundant: redundant experts asked for; None is 0, E/16,
    E/8 and E/4, and where these come to the same number of slots, one more per GPU. intervals: windows of the record, rounded up to
    runs of merged ones; None is a third of the record and a half, a quarter and an eighth of that. target: next-window balancedness
    that a chosen EP size keeps. num_groups: of experts, where routing is group-limited. Raises BadReport naming the field.
    """

    expert_bytes: int
    ep_sizes: tuple[int, ...] = DEFAULT_EP_SIZES
    algorithms: tuple[str, ...] = ("auto", "deepseek")
    redundant: tuple[int, ...] | None = None
    intervals: tuple[int, ...] | None = None
    ep_size: int | None = None
    gpus_per_node: int = 8
    num_groups: int = 1
    target: float = 0.9

    def __post_init__(self) -> None:
        for ep_size in self.sizes:
            if not 1 <= ep_size <= MAX_GPUS:
                raise BadReport(f"ep_size must be from 1 to {MAX_GPUS}, got {ep_size}")
        for name, lowest in (("redundant", 0), ("intervals", 1)):
            values = getattr(self, name)
            if values is not None and min(values, default=-1) < lowest:
                raise BadReport(f"{name} must be numbers from {lowest} on, got {list(values)}")
        for name in ("expert_bytes", "gpus_per_node", "num_groups"):
            if getattr(self, name) < 1:
                raise BadReport(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.target <= 1:
            raise BadReport(f"target must be above 0 and at most 1, got {self.target}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """All EP sizes, ascending."""
        return tuple(sorted({*self.ep_sizes, *(() if self.ep_size is None else (self.ep_size,))}))


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The setting to use and, in sentences, why. `without`: the same EP size without EPLB, which `point` is if EPLB doesn't pay."""

    point: PlanPoint
    without: PlanPoint
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A finished sweep, in windows of the record of which `run` were merged into one.

    by_interval: at one EP size, over the whole record; without: a point per EP size; by_gpus: one per EP size and number of slots;
    by_policy: at the recommended EP size and slots. The last three are over the record's last windows, at one interval.
    """

    source: str
    num_layers: int
    num_experts: int
    num_windows: int
    run: int
    expert_bytes: int
    without: tuple[PlanPoint, ...]
    by_gpus: tuple[PlanPoint, ...]
    by_policy: tuple[PlanPoint, ...]
    by_interval: tuple[PlanPoint, ...]
    recommendation: Recommendation


def make_plan(record: LoadRecord, options: PlanOptions, *, source: str = "") -> Plan:
    """Replay the record on every setting.

    Raises BadReport for a record without any load, or with too few windows for an interval.
    """
    if not record.logical_count.any():
        raise BadReport(f"{source or 'the load'}: field 'logical_count' is all zero, so there is nothing to plan for")
    replay, intervals = _replay(record, options)
    main = options.algorithms[0]
    middle = options.ep_size or options.sizes[len(options.sizes) // 2]
    *_, probe = _clusters(options, replay.num_experts, min(middle, _LARGEST_PROBE))
    by_interval = [replay.rebalanced(probe, main, interval) for interval in intervals]
    interval, interval_reason = _choose_interval(by_interval)
    recent = _recent(replay, intervals[by_interval.index(interval)])
    without = [recent.without_eplb(_cluster(options, replay.num_experts, ep_size, 0)) for ep_size in options.sizes]
    by_gpus = [
        recent.rebalanced(cluster, main, recent.warm_up)
        for ep_size in options.sizes
        for cluster in _clusters(options, replay.num_experts, ep_size)
    ]
    best_size, size_reason = _choose_size(by_gpus, options)
    best_slots, slots_reason = _choose_slots([point for point in by_gpus if point.ep_size == best_size])
    cluster = _cluster(options, replay.num_experts, best_size, best_slots.num_redundant_experts)
    by_policy = [best_slots, *(recent.rebalanced(cluster, each, recent.warm_up) for each in options.algorithms[1:])]
    best, policy_reason = _choose_policy(by_policy)
    reasons = [size_reason, slots_reason, policy_reason, interval_reason]
    return Plan(
        source=source,
        num_layers=replay.counts.shape[1],
        num_experts=replay.num_experts,
        num_windows=len(record.logical_count),
        run=replay.run,
        expert_bytes=options.expert_bytes,
        without=tuple(without),
        by_gpus=tuple(by_gpus),
        by_policy=tuple(by_policy),
        by_interval=tuple(by_interval),
        recommendation=_conclude(best, next(point for point in without if point.ep_size == best_size), reasons),
    )


def _replay(record: LoadRecord, options: PlanOptions) -> tuple[Replay, list[int]]:
    """The record in at most MAX_WINDOWS windows, and the intervals in these, ascending."""
    counts, _ = merge_windows(record.logical_count, MAX_WINDOWS)
    run = -(-len(record.logical_count) // len(counts))
    if options.intervals is None:
        longest = max(1, len(counts) // 3)
        intervals = sorted({max(1, longest // part) for part in (1, 2, 4, 8)})
    else:
        intervals = sorted({-(-each // run) for each in options.intervals})
        if intervals[-1] > len(counts):
            raise BadReport(
                f"an interval of {max(options.intervals)} windows is longer than the record: {len(record.logical_count)}"
            )
    return Replay(counts=counts, warm_up=intervals[-1], run=run, expert_bytes=options.expert_bytes), intervals


def _recent(replay: Replay, interval: int) -> Replay:
    """The last windows alone, for _SWEEP_MOVES placements at most: a sweep of forty settings has to end."""
    return replace(replay, counts=replay.counts[-(1 + _SWEEP_MOVES) * interval :], warm_up=interval)


def _cluster(options: PlanOptions, num_experts: int, ep_size: int, redundant: int) -> Cluster:
    """`redundant` experts or a few more, so that the slots divide."""
    num_nodes = ep_size // options.gpus_per_node if ep_size % options.gpus_per_node == 0 else 1
    num_slots = -(-(num_experts + redundant) // ep_size) * ep_size
    return Cluster(ep_size=ep_size, num_slots=num_slots, num_nodes=num_nodes, num_groups=options.num_groups)


def _clusters(options: PlanOptions, num_experts: int, ep_size: int) -> Iterator[Cluster]:
    """One per different number of slots, fewest first."""
    asked = options.redundant
    if asked is None:
        asked = (0, num_experts // 16, num_experts // 8, num_experts // 4)
    by_slots = {(cluster := _cluster(options, num_experts, ep_size, each)).num_slots: cluster for each in asked}
    if len(by_slots) == 1 and options.redundant is None:
        [slots] = by_slots
        by_slots[slots + ep_size] = _cluster(options, num_experts, ep_size, slots + ep_size - num_experts)
    yield from (by_slots[num_slots] for num_slots in sorted(by_slots))


def _choose_size(points: Sequence[PlanPoint], options: PlanOptions) -> tuple[int, str]:
    if options.ep_size is not None:
        return options.ep_size, f"{options.ep_size} GPUs were asked for."
    best = {size: max(point.figure for point in points if point.ep_size == size) for size in options.sizes}
    enough = [size for size in options.sizes if best[size] >= options.target]
    if not enough:
        size = max(best, key=lambda each: best[each])
        return size, f"No EP size keeps a balancedness of {options.target:.2f}; {size} GPUs come nearest, with {best[size]:.3f}."
    size = enough[-1]
    larger = [each for each in options.sizes if each > size]
    after = f"; {larger[0]} GPUs would reach {best[larger[0]]:.3f}" if larger else ", the largest size of the sweep"
    return size, f"{size} GPUs are the most that keep a balancedness of {options.target:.2f} or more ({best[size]:.3f}{after})."


def _choose_slots(points: Sequence[PlanPoint]) -> tuple[PlanPoint, str]:
    best = max(points, key=lambda point: point.figure)
    point = next(each for each in points if each.figure >= _CLOSE * best.figure)
    if len(points) == 1:
        return point, f"{point.num_slots} slots ({point.num_redundant_experts} redundant experts) are the only number tried there."
    beaten = f"the best, {best.figure:.3f} with {best.num_slots}" if point is not best else "the best of those tried"
    said = f"{point.num_slots} slots ({point.num_redundant_experts} redundant experts, {point.figure:.3f})"
    return point, f"{said} are the fewest within 1% of {beaten}."


def _choose_policy(points: Sequence[PlanPoint]) -> tuple[PlanPoint, str]:
    """Of the policies near the best, the first one that moves about as little as any of them."""
    if len(points) == 1:
        return points[0], f"Policy '{points[0].policy}' is the only one tried."
    best = max(point.figure for point in points)
    close = [point for point in points if point.figure >= _WORTH_MOVING * best]
    least = min(_bytes(point) for point in close)
    point = next(each for each in close if _bytes(each) * _SIMILAR_BYTES <= least)
    moved = {each.policy: f"'{each.policy}' {each.figure:.3f} moving {size(_bytes(each))}" for each in points}
    others = "; ".join(moved[each.policy] for each in points if each is not point)
    return point, f"Of the policies within 3% of the best, {moved[point.policy]} per rebalance moves least; others: {others}."


def _choose_interval(points: Sequence[PlanPoint]) -> tuple[PlanPoint, str]:
    best = max(point.figure for point in points)
    point = next(each for each in reversed(points) if each.figure >= _WORTH_MOVING * best)
    said = counted(point.interval or 0, "window")
    if len(points) == 1:
        return point, f"An interval of {said} is the only one tried."
    others = ", ".join(f"{each.interval}: {each.figure:.3f}" for each in points if each is not point)
    where = f"{point.ep_size} GPUs, {point.num_slots} slots"
    return point, f"An interval of {said} is the longest within 3% of the best ({point.figure:.3f}; {others}; {where})."


def _conclude(point: PlanPoint, without: PlanPoint, reasons: list[str]) -> Recommendation:
    kind = "in-sample (the record has no next window, so this is optimistic)" if point.next_window is None else "next-window"
    if without.figure >= _CLOSE * point.figure:
        gain = f"EPLB doesn't pay here: {kind} balancedness is {without.figure:.3f} without it, {point.figure:.3f} with it."
        return Recommendation(point=without, without=without, reasons=(reasons[0], gain))
    gain = (
        f"Without EPLB {kind} balancedness is {without.figure:.3f}, with it {point.figure:.3f} (bound {point.bound:.3f}, gap "
        f"{gap(point.figure, point.bound):.1%}): the busiest GPU has {point.figure / without.figure:.2f} times less expert work."
    )
    return Recommendation(point=point, without=without, reasons=(*reasons, gain))


def _bytes(point: PlanPoint) -> float:
    return point.first_bytes if point.bytes_per_rebalance is None else point.bytes_per_rebalance
