"""What admission leaves free for running sequences: estimates that follow what has been observed, and what they gain."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_admission import RESERVED_TOKENS, FixedReserve, short_answers, simulate

from moesaic.launch.engine.growth import Growth, peak_growth
from moesaic.launch.engine.output_lengths import UNKNOWN, WINDOW, OutputLengths
from moesaic.launch.engine.sequence import Int64Array


def _ints(*values: int) -> Int64Array:
    return np.array(values, dtype=np.int64)


def _expected(growth: Growth, remaining: int, produced: int) -> int:
    return growth.expected_tokens(_ints(remaining), _ints(produced), _ints(produced))


def test_what_is_left_is_the_median_of_those_that_got_further() -> None:
    lengths = OutputLengths()
    for length in (*range(10, 20), *range(100, 110)):
        lengths.add(length)

    assert lengths.remaining(_ints(0, 12, 50, 101, 105)).tolist() == [19, 101 - 12, 104 - 50, 105 - 101, UNKNOWN]


def test_the_window_forgets_what_is_long_ago() -> None:
    lengths = OutputLengths()
    for length in (*[1000] * WINDOW, *[10] * WINDOW):
        lengths.add(length)

    assert lengths.remaining(_ints(5, 500)).tolist() == [5, UNKNOWN]


def test_the_bound_holds_until_enough_was_seen_and_ever_after() -> None:
    growth = Growth(50)
    assert (_expected(growth, 1000, 1), _expected(growth, 20, 1)) == (50, 20)

    for _ in range(20):
        growth.ended(30)
    assert (_expected(growth, 1000, 1), _expected(growth, 20, 1)) == (29, 20)
    assert _expected(growth, 1000, 40) == 50, "none was ever as long as this one"
    for _ in range(5):
        growth.was_too_low()
    assert _expected(growth, 1000, 1) == 50


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_is_what_growing_step_by_step_comes_to(seed: int) -> None:
    rng = np.random.default_rng(seed)
    growth, held = rng.integers(0, 12, 6), rng.integers(0, 30, 6)
    needed = [
        sum(steps if steps <= grows else -holds for grows, holds in zip(growth, held, strict=True))
        for steps in range(int(growth.max()) + 1)
    ]
    assert peak_growth(growth, held) == max(needed)


def test_observed_lengths_admit_more_than_a_fixed_reserve_and_retract_rarely() -> None:
    lengths = short_answers(np.random.default_rng(1), 400)
    fixed, observed = simulate(FixedReserve(RESERVED_TOKENS), lengths), simulate(Growth(RESERVED_TOKENS), lengths)

    assert observed.running > 1.5 * fixed.running
    assert observed.retracted <= 1, "of 100 requests"
