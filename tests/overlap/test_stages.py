"""Lists are cut at yields, layers joined without one, and a list that doesn't fit its strategy is refused by layer and stage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.overlap.operations import Operation, State, YieldOperation
from moesaic.overlap.stages import BadStages, Strategy, cut_into_stages, join_layers

YIELD = YieldOperation()


def op(name: str, layer: int | None = None) -> Operation:
    return Operation(name, _nothing, layer)


def _nothing(state: State) -> None:
    pass


LISTS = st.lists(st.one_of(st.just(YIELD), st.sampled_from("abcd").map(op)), max_size=12)


@given(LISTS)
def test_stages_hold_every_operation_in_order_and_meet_at_the_yields(operations: list[Operation | YieldOperation]) -> None:
    rebuilt: list[Operation | YieldOperation] = []
    for place, stage in enumerate(cut_into_stages(operations)):
        rebuilt += [YIELD, *stage] if place else stage
    assert rebuilt == operations


def test_the_last_stage_of_a_layer_merges_with_the_first_of_the_next() -> None:
    layers = {index: [op("attention", index), YIELD, op("experts", index), YIELD, op("output", index)] for index in (3, 4)}
    stages = join_layers(layers, Strategy(name="prefill", yields_per_layer=2, delta_stages=0))
    assert [[each.title for each in stage] for stage in stages] == [
        ["attention of layer 3"],
        ["experts of layer 3"],
        ["output of layer 3", "attention of layer 4"],
        ["experts of layer 4"],
        ["output of layer 4"],
    ]


def test_a_list_that_ends_with_a_yield_keeps_its_layers_apart() -> None:
    layers = {index: [op("attention", index), YIELD] for index in (0, 1)}
    stages = join_layers(layers, Strategy(name="s", yields_per_layer=1, delta_stages=1))
    assert [[each.title for each in stage] for stage in stages] == [["attention of layer 0"], ["attention of layer 1"], []]


def test_a_yield_too_many_is_refused_with_layer_and_stage() -> None:
    good = [op("attention"), YIELD, op("experts")]
    bad = [*good, YIELD, op("combine_b"), op("output")]
    message = (
        r"layer 7: strategy decode declares 1 yields, the list has 2; "
        r"stage 2 \(combine_b, output\) is one too many: take out the yield"
    )
    with pytest.raises(BadStages, match=message):
        join_layers({6: good, 7: bad}, Strategy(name="decode", yields_per_layer=1, delta_stages=1))


def test_a_missing_yield_is_refused_with_layer_and_stage() -> None:
    lists = {5: [op("attention"), YIELD, op("experts"), op("output")]}
    with pytest.raises(BadStages, match=r"layer 5: .* stage 1 \(experts, output\) is the last, where 3 are expected"):
        join_layers(lists, Strategy(name="prefill", yields_per_layer=2, delta_stages=0))


def test_an_offset_that_leaves_nothing_to_overlap_is_refused() -> None:
    lists = {0: [op("attention"), YIELD, op("experts")]}
    with pytest.raises(BadStages, match=r"delta_stages 2 leaves nothing to overlap in 2 stages \(1 layers\); use 1 or less"):
        join_layers(lists, Strategy(name="decode", yields_per_layer=1, delta_stages=2))


@pytest.mark.parametrize(("yields", "delta", "field"), [(0, 0, "yields_per_layer is 0"), (1, -1, "delta_stages is -1")])
def test_a_strategy_that_can_not_overlap_is_refused(yields: int, delta: int, field: str) -> None:
    with pytest.raises(BadStages, match=field):
        Strategy(name="s", yields_per_layer=yields, delta_stages=delta)
