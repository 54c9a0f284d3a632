"""Rebalancing over many steps: what it decides, and that a failure anywhere leaves every layer old or new on all survivors."""

from __future__ import annotations

import multiprocessing as mp
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eplb_cluster import CONFIG, Cluster, Rank, num_ended
from eplb_jobs import ManagerCase, manager_job, run_managers_and_die
from eplb_network import Action, Seam
from eplb_weights import ladder
from rank_pool import RankPool

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation

OLD, NEW, OTHER = ladder(np.random.default_rng(0), 3, num_layers=2, num_experts=8, num_slots=12, ep_size=4)


def cluster(seam: Seam | None = None, **kwargs: Any) -> Cluster:
    return Cluster(OLD, [NEW, OTHER], seam=seam, **kwargs)


def placement(rank: Rank) -> list[list[int]]:
    rows: list[list[int]] = rank.served.physical_to_logical.tolist()
    return rows


def check_old_or_new(ranks: list[Rank]) -> None:
    """Every layer is wholly old or wholly new, weights and map, and the same on all these ranks."""
    for rank in ranks:
        assert rank.lies() == []
        for layer, row in enumerate(placement(rank)):
            assert row in (OLD.physical_to_logical[layer].tolist(), NEW.physical_to_logical[layer].tolist())
        assert placement(rank) == placement(ranks[0])


def same(location: ExpertLocation, rank: Rank) -> bool:
    return placement(rank) == location.physical_to_logical.tolist()


def test_a_cycle_begins_after_so_many_forwards_and_ends_with_the_wanted_placement() -> None:
    members = cluster(config=replace(CONFIG, num_iterations=5))
    for _ in range(4):
        members.step()
        assert not members.ranks[0].manager.busy
    members.step()
    assert members.ranks[0].manager.busy
    members.run_cycle()
    check_old_or_new(members.ranks)
    assert all(same(NEW, rank) for rank in members.ranks)
    status = members.status()
    assert (status.committed_cycles, status.layers_done, status.layers_total, status.degraded) == (1, 2, 2, False)
    assert status.bytes_moved > 0
    assert status.last_predicted_saving_s > status.last_predicted_cost_s


def test_steps_without_a_forward_do_not_count_but_a_command_starts_at_once() -> None:
    members = cluster()
    for _ in range(10):
        words = members.words()
        assert words is not None
        for rank in members.ranks:
            rank.manager.advance(words, forward=False)
    assert not members.ranks[0].manager.busy
    for rank in members.ranks:
        rank.manager.start_now()
        assert rank.manager.busy
    members.run_cycle()
    assert same(NEW, members.ranks[0])


def test_every_forward_finds_weights_and_map_in_agreement() -> None:
    members = cluster(config=replace(CONFIG, step_budget_s=1e-9))
    for _ in range(300):
        members.step()
        assert all(rank.lies() == [] for rank in members.ranks)
        assert len({str(placement(rank)) for rank in members.ranks}) == 1
    assert members.status().committed_cycles == 2


def test_layers_per_chunk_leaves_a_step_between_chunks() -> None:
    def steps(layers_per_chunk: int | None) -> int:
        members = cluster(config=replace(CONFIG, layers_per_chunk=layers_per_chunk))
        members.run_cycle()
        assert same(NEW, members.ranks[0])
        return members.steps

    assert steps(1) == steps(None) + 1
    assert steps(2) == steps(None)


def test_above_the_utilization_threshold_nothing_is_solved() -> None:
    members = cluster(config=replace(CONFIG, min_utilization=0.01))
    members.run_cycle()
    status = members.status()
    assert (status.skipped_cycles, status.last_skip_reason) == (1, "balancedness is above the threshold")
    assert same(OLD, members.ranks[0])


def test_a_move_that_costs_more_than_it_saves_is_skipped() -> None:
    members = cluster(config=replace(CONFIG, cost_s_per_gib=1e12))
    members.run_cycle()
    status = members.status()
    assert (status.skipped_cycles, status.last_skip_reason) == (1, "the saving is below the cost")
    assert status.last_predicted_cost_s > status.last_predicted_saving_s
    assert same(OLD, members.ranks[0])


def test_without_tokens_nothing_is_moved() -> None:
    members = cluster()
    for rank in members.ranks:
        rank.counts[:] = 0
    members.run_cycle()
    assert members.status().last_skip_reason == "no tokens were counted"
    assert members.status().last_balances == {}


def test_the_present_placement_moves_nothing() -> None:
    members = Cluster(OLD, [OLD])
    members.run_cycle()
    assert members.status().last_skip_reason == "the wanted placement is the present one"


def test_the_realised_gain_is_what_the_replaced_placement_would_have_taken() -> None:
    """One GPU held the two hot experts; after the move the busiest GPU has half the load, so experts take half the time."""
    row = np.array([[0, 1, 2, 3]], dtype=np.int64)
    hot_together = ExpertLocation(physical_to_logical=row, num_experts=4, ep_size=2)
    hot_apart = hot_together.with_layer(0, np.array([0, 2, 1, 3]))
    members = Cluster(hot_together, [hot_apart], config=replace(CONFIG, num_iterations=4, moe_share=0.5))
    for rank in members.ranks:
        rank.counts[:] = [[100, 100, 0, 0]]
    members.run_cycle()
    assert members.status().last_realised_gain_s == 0.0
    members.run_cycle()
    # 4 forwards of 1 s (the tick), half of it experts, which would have taken twice as long.
    assert members.status().last_realised_gain_s == pytest.approx(4 * 1.0 * 0.5)
    assert members.status().last_skip_reason == "the wanted placement is the present one"


def two_modes() -> Cluster:
    """Four experts on two GPUs: experts 0 and 1 share one, and are hot in prefill. Solves find nothing better."""
    members = Cluster(ExpertLocation(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, ep_size=2), [])
    for rank in members.ranks:
        rank.counts[:] = [[[50, 50, 0, 0]], [[30, 0, 10, 10]]]
    return members


def test_every_balancedness_stands_beside_its_bound_for_all_tokens_and_per_forward_mode(caplog: pytest.LogCaptureFixture) -> None:
    members = two_modes()
    with caplog.at_level("INFO", logger="moesaic.eplb.manager"):
        members.run_cycle()
    # All: 260 and 40 tokens on the GPUs, expert 0 alone has 160. Decode: 60 and 40, and expert 0 alone is the 60.
    figures = {mode: (balance.balancedness, balance.bound) for mode, balance in members.status().last_balances.items()}
    assert figures == {
        "all": (pytest.approx(150 / 260), pytest.approx(150 / 160)),
        "prefill": (pytest.approx(1 / 2), pytest.approx(1)),
        "decode": (pytest.approx(50 / 60), pytest.approx(50 / 60)),
    }
    assert members.status().last_balances["decode"].gap == 0
    assert members.status().last_predicted == members.status().last_balances["all"]
    line = "balancedness 0.577 of at most 0.938 (gap 38.5%); prefill 0.500 of at most 1.000 (gap 50.0%); "
    assert line + "decode 0.833 of at most 0.833 (gap 0.0%)" in caplog.text


def test_what_had_no_tokens_has_no_balancedness() -> None:
    members = two_modes()
    assert members.status().last_balances == {}
    assert members.status().last_predicted is None
    for rank in members.ranks:
        rank.counts[0] = 0
    members.run_cycle()
    assert members.status().last_balances.keys() == {"all", "decode"}


def test_a_plan_says_what_it_promises_under_the_same_bound(caplog: pytest.LogCaptureFixture) -> None:
    members = cluster()
    with caplog.at_level("INFO", logger="moesaic.eplb.manager"):
        members.run_cycle()
    status = members.status()
    before, after = status.last_balances["all"], status.last_predicted
    assert after is not None
    assert before.balancedness < after.balancedness <= after.bound == before.bound
    promise = f"balancedness {before.balancedness:.3f} -> {after.balancedness:.3f} of at most {before.bound:.3f} "
    assert promise + f"(gap {before.gap:.1%} -> {after.gap:.1%})" in caplog.text


def count_events() -> dict[str, int]:
    members = cluster()
    members.run_cycle()
    assert same(NEW, members.ranks[0])
    return dict(members.seam.seen)


EVENTS = count_events()
POINTS: list[tuple[str, int, Action]] = [
    *[("post", at, action) for at in range(EVENTS["post"]) for action in ("fail", "kill", "corrupt", "lose")],
    *[("end", at, action) for at in range(0, EVENTS["end"], 2) for action in ("fail", "kill")],
    *[(kind, at, action) for kind in ("commit", "committed") for at in range(EVENTS[kind]) for action in ("fail", "kill")],
]


def recover(ranks: list[Rank]) -> None:
    """What survivors do when a rank died while they stepped: who lacks a layer that another has committed completes it."""
    committed = [layer for layer in range(OLD.num_layers) if len({str(placement(rank)[layer]) for rank in ranks}) > 1]
    for rank in ranks:
        if rank.undecided_layer in committed:
            rank.roll_forward()


@pytest.mark.parametrize("action", ["fail", "kill", "corrupt", "lose"])
def test_one_fault_at_every_message_leaves_every_layer_old_or_new_and_the_next_cycle_works(action: Action) -> None:
    for kind, at, _ in [point for point in POINTS if point[2] == action]:
        members = cluster(Seam(kind=kind, at=at, action=action))
        members.run_cycle()
        assert (action == "kill") == bool(members.dead), (kind, at)
        recover(members.survivors)
        check_old_or_new(members.survivors)
        if members.dead:
            continue
        status = members.status()
        ended_well = kind in ("commit", "committed")
        assert (status.abandoned_cycles == 0) == (ended_well or status.committed_cycles == 1), (kind, at, status)
        assert status.degraded == bool(status.abandoned_cycles), (kind, at, status)
        members.run_cycle()
        assert members.status().committed_cycles == status.committed_cycles + 1, (kind, at)
        assert all(rank.lies() == [] for rank in members.ranks), (kind, at)
        assert all(same(OTHER if status.committed_cycles else NEW, rank) for rank in members.ranks)
        assert members.status().last_cause == status.last_cause


def test_a_death_in_the_middle_of_any_word_exchange_is_settled_by_rolling_forward() -> None:
    """Rank 3 dies; its word has reached only some. Who heard it may have committed, who hasn't can still do so."""
    for at in range(2, 16):
        for heard in ({0}, {0, 1}, {1, 2}, set()):
            members = cluster()
            for _ in range(at):
                members.step()
            members.step(hears=lambda rank, heard=heard: rank in heard)
            members.dead.add(3)
            recover(members.survivors)
            assert all(rank.lies() == [] for rank in members.survivors), (at, heard)
            assert len({str(placement(rank)) for rank in members.survivors}) == 1, (at, heard)


def test_a_garbled_word_in_any_step_abandons_and_names_the_rank() -> None:
    for at in range(12):
        members = cluster()
        for _ in range(at):
            members.step()
        before = members.status()

        def garble(words: list[int]) -> None:
            words[2] ^= 0x3FF << 28

        members.step(garble=garble)
        assert members.status().abandoned_cycles == 1
        assert "rank 2: its word is of another phase, cycle or layer" in members.status().last_cause
        assert members.status().degraded
        check_old_or_new(members.ranks)
        members.run_until(lambda members=members, before=before: members.status().committed_cycles > before.committed_cycles)
        assert not members.status().degraded
        assert all(rank.lies() == [] for rank in members.ranks)


def test_plans_that_differ_are_abandoned_naming_the_rank() -> None:
    members = cluster()
    members.ranks[2].manager._solve = lambda counts, location: OTHER.physical_to_logical
    members.run_cycle()
    assert members.status().last_cause == "plan: rank 2: its plan is not that of rank 0"
    check_old_or_new(members.ranks)
    assert same(OLD, members.ranks[0])


def raise_no_plan(*_: object) -> Any:
    raise ValueError("no plan")


@pytest.mark.parametrize(
    "solve", [raise_no_plan, lambda counts, location: location.physical_to_logical * 0, lambda counts, location: np.zeros((1, 2))]
)
def test_a_solver_that_fails_on_one_rank_abandons_the_cycle(solve: Callable[..., Any]) -> None:
    members = cluster()
    working = members.ranks[1].manager._solve
    members.ranks[1].manager._solve = solve
    members.run_cycle()
    assert members.status().last_cause == "plan: rank 1: its planner failed"
    members.ranks[1].manager._solve = working
    members.run_cycle()
    assert same(NEW, members.ranks[0])


def test_a_stalled_planner_is_reported_within_its_deadline_and_replaced() -> None:
    members = cluster(config=replace(CONFIG, plan_deadline_s=5.0))
    release = threading.Event()
    members.hold_planner = {1: release}
    members.run_until(lambda: members.status().phase == "plan")
    began = members.now
    members.run_until(lambda: members.status().abandoned_cycles == 1, limit=100_000)
    assert members.now - began <= 5.0 + 2 * members.tick_s
    assert members.status().last_cause == "plan: rank 1: its planner passed the deadline and was replaced"
    assert members.status(1).stalled_planners == 1
    assert members.status(1).degraded
    members.hold_planner = {}
    release.set()
    members.run_cycle()
    assert same(NEW, members.ranks[0])
    members.step()
    assert not members.status(1).degraded
    assert members.status(1).stalled_planners == 0


def test_a_rank_that_stops_moving_is_named_by_the_others_and_recovers() -> None:
    members = cluster(config=replace(CONFIG, move_deadline_s=6.0))
    mover = members.ranks[2].mover
    working = mover.work
    mover.work = lambda until: False  # type: ignore[method-assign]
    members.run_until(lambda: members.status().phase == "move")
    began = members.now
    members.run_until(lambda: members.status().abandoned_cycles == 1)
    assert members.now - began <= 6.0 + 2 * members.tick_s
    assert members.status().last_cause.startswith("move of sparse layer 0: rank 2:")
    mover.work = working  # type: ignore[method-assign]
    members.run_cycle()
    assert same(NEW, members.ranks[0])
    assert members.status().quarantined_messages == 0
    assert not members.status().degraded


def test_lost_messages_are_counted_and_too_many_block_the_next_cycle() -> None:
    seam = Seam(kind="post", at=EVENTS["post"] - 1, action="lose")
    members = cluster(seam, config=replace(CONFIG, max_quarantined=0))
    members.run_cycle()
    assert members.status().abandoned_cycles == 1
    members.step()
    assert max(members.status(rank).quarantined_messages for rank in range(4)) == 1
    members.run_cycle()
    assert "too many messages of abandoned cycles are still under way" in members.status().last_cause
    check_old_or_new(members.ranks)


def test_committed_layers_of_an_abandoned_cycle_stay() -> None:
    members = cluster(Seam(kind="post", at=EVENTS["post"] - 1, action="fail"))
    members.run_cycle()
    assert members.status().last_cause.startswith("move of sparse layer 1: rank")
    for rank in members.ranks:
        assert placement(rank) == [NEW.physical_to_logical[0].tolist(), OLD.physical_to_logical[1].tolist()]
        assert rank.lies() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_iterations", 0), ("layers_per_chunk", 0), ("min_utilization", 1.5), ("move_deadline_s", 0.0), ("cost_s_per_gib", -1.0)],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RebalanceConfig(**{field: value})


@pytest.mark.parametrize("world", [2, 4])
def test_two_cycles_over_gloo_bring_the_wanted_placement(rank_pool: RankPool, world: int) -> None:
    for reports in rank_pool.run(world, manager_job, ManagerCase(world=world, fault="")):
        assert [report["lies"] for report in reports] == [[], []]
        assert [num_ended(report["status"]) for report in reports] == [1, 2]
        assert reports[0]["status"].committed_cycles == 1
        assert reports[1]["status"].last_skip_reason == "the wanted placement is the present one"


@pytest.mark.parametrize("after_posts", [3, 5])
@pytest.mark.parametrize("fault", ["stall", "corrupt"])
def test_after_a_fault_over_gloo_the_next_cycle_works(rank_pool: RankPool, fault: Any, after_posts: int) -> None:
    case = ManagerCase(world=4, fault=fault, after_posts=after_posts, seed=1 + after_posts + 10 * (fault == "stall"))
    everyone = rank_pool.run(4, manager_job, case)
    for first, second in everyone:
        assert first["status"].abandoned_cycles == 1
        assert "rank" in first["status"].last_cause
        assert second["status"].committed_cycles == 1
        assert first["lies"] == second["lies"] == []
        assert np.array_equal(first["placement"], everyone[0][0]["placement"])
        assert np.array_equal(second["placement"], everyone[0][1]["placement"])
    if fault == "stall":
        assert "rank 1" in everyone[0][0]["status"].last_cause


def test_a_process_that_dies_in_the_middle_of_a_layer_leaves_the_others_old_or_new(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    case = ManagerCase(world=3, fault="die", victim=1, after_posts=3)
    pipes, processes = [], []
    for rank in range(3):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_managers_and_die, args=(rank, case, str(tmp_path / "meet"), theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    survivors = []
    for rank in (0, 2):
        assert pipes[rank].poll(60), f"rank {rank} hangs"
        survivors.append(pipes[rank].recv()[-1])
    assert [report["lies"] for report in survivors] == [[], []]
    assert np.array_equal(survivors[0]["placement"], survivors[1]["placement"])
    for process in processes:
        process.join(30)
        assert not process.is_alive()
