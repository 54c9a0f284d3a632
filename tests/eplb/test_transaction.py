"""Words come back as they were packed, all ranks judge them alike, and a layer is committed whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eplb_cluster import SeamMover
from eplb_network import MemoryNetwork, Seam
from eplb_weights import make_weights, random_location, slots_that_lie
from hypothesis import given
from hypothesis import strategies as st

from moesaic.eplb.moves import plan_moves
from moesaic.eplb.transaction import Cause, LayerTransaction, Phase, State, Word, judge
from moesaic.eplb.transfer import Quarantine, TransferError

PLACE = (Phase.MOVE, 5, 2)


def word(state: State, cause: Cause = Cause.NONE, payload: int = 0, *, layer: int = 2) -> Word:
    return Word(phase=Phase.MOVE, cycle=5, layer=layer, state=state, cause=cause, payload=payload)


WORDS = st.builds(
    Word,
    phase=st.sampled_from(Phase),
    cycle=st.integers(0, (1 << 14) - 1),
    layer=st.integers(0, (1 << 10) - 1),
    state=st.sampled_from(State),
    cause=st.sampled_from(Cause),
    payload=st.integers(0, (1 << 28) - 1),
)


@given(WORDS)
def test_a_word_travels_as_one_int64(said: Word) -> None:
    packed = said.pack()
    assert Word.unpack(int(torch.tensor([packed], dtype=torch.int64))) == said


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_no_garbage_crashes_the_reader(value: int) -> None:
    said = Word.unpack(value)
    assert said is None or Word.unpack(said.pack()) == said


def test_all_ready_ends_the_phase() -> None:
    assert judge([word(State.READY)] * 4, PLACE).state == State.READY


def test_one_failure_abandons_and_is_named() -> None:
    verdict = judge([word(State.READY), word(State.WORKING), word(State.FAILED, Cause.CHECKSUM)], PLACE)
    assert verdict.state == State.FAILED
    assert verdict.text == "rank 2: weights did not arrive as they were sent"


def test_who_was_waited_for_in_vain_is_named_not_who_says_so() -> None:
    verdict = judge([word(State.READY), word(State.FAILED, Cause.RANK_STALLED, 3), *[word(State.READY)] * 2], PLACE)
    assert verdict.text == "rank 3: it made no progress within the deadline"


@pytest.mark.parametrize(
    ("waiting_for", "held_up_by"),
    [
        ([1, 3, None, -1], 3),  # 0 waits for 1, which waits for 3, which waits for nobody
        ([None, 0, 1, 2], 1),  # 3 -> 2 -> 1 -> 0, and 0 is ready: 1 is the first that is not
        ([1, 0, None, None], 1),  # in a circle
    ],
)
def test_the_end_of_the_chain_of_waiting_ranks_holds_all_up(waiting_for: list[int | None], held_up_by: int) -> None:
    words = [word(State.READY) if peer is None else word(State.WORKING, payload=peer + 1) for peer in waiting_for]
    verdict = judge(words, PLACE)
    assert (verdict.state, verdict.rank) == (State.WORKING, held_up_by)


def test_a_word_of_another_layer_or_no_word_is_out_of_step() -> None:
    for stray in (word(State.READY, layer=3), None):
        verdict = judge([word(State.READY), stray], PLACE)
        assert (verdict.state, verdict.rank, verdict.cause) == (State.FAILED, 1, Cause.OUT_OF_STEP)


@given(st.lists(WORDS, min_size=1, max_size=6))
def test_commit_needs_everyone(words: list[Word]) -> None:
    verdict = judge(words, words[0].place)
    assert (verdict.state == State.READY) == all(said.state == State.READY and said.place == words[0].place for said in words)


def one_transaction(seam: Seam) -> tuple[LayerTransaction, list[str], list[tuple[int, int]]]:
    """A layer of one GPU, staged; the events of its switch, and a way to see which slots are not yet new."""
    rng = np.random.default_rng(0)
    old, new = (random_location(rng, num_layers=1, num_experts=4, num_slots=6, ep_size=1) for _ in range(2))
    layers = make_weights(old, 0)
    mover = SeamMover(layers=layers, wire=MemoryNetwork(1, seam).wire(0), quarantine=Quarantine(), clock=lambda: 0.0)
    mover.seam = seam
    moves = plan_moves(old.physical_to_logical[0], new.physical_to_logical[0], ep_size=1)
    switched: list[str] = []
    lies: list[tuple[int, int]] = []

    def switch(layer: int) -> None:
        switched.append(f"layer {layer}")
        lies.extend(slots_that_lie(new, 0, layers))

    transaction = LayerTransaction(mover=mover, cycle=1, layer=0, moves=moves, switch=switch)
    assert transaction.work(1.0)
    assert not slots_that_lie(old, 0, layers)
    return transaction, switched, lies


def test_the_map_is_switched_only_when_all_weights_are_in_their_slots() -> None:
    transaction, switched, lies = one_transaction(Seam())
    transaction.commit()
    assert switched == ["layer 0"]
    assert lies == []


def test_a_copy_that_fails_once_is_rolled_forward() -> None:
    transaction, switched, lies = one_transaction(Seam(kind="committed", at=0))
    transaction.commit()
    assert switched == ["layer 0"]
    assert lies == []


def test_a_copy_that_fails_twice_ends_the_rank_and_switches_no_map() -> None:
    seam = Seam(kind="commit", at=0)
    transaction, switched, _ = one_transaction(seam)
    seam.passes = lambda kind: (_ for _ in ()).throw(TransferError("again"))  # type: ignore[method-assign]
    with pytest.raises(TransferError, match="again"):
        transaction.commit()
    assert switched == []
