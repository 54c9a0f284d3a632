"""Splitting is chosen from measured timings only where it wins for good; a profile of another layout is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.overlap.calibration import (
    MIN_GAIN,
    BadProfile,
    Measurement,
    Profile,
    counts_to_measure,
    read_profile,
    split_threshold,
    summarise,
    worst_regret,
    write_profile,
)

LAYOUT = {"ep_size": 2, "dp_size": 2, "moe_a2a_backend": "torch"}
MODES = ("prefill", "decode")


def _points(ratios: dict[int, float]) -> list[Measurement]:
    """Straight steps of 1 ms; token count -> split time over straight time."""
    return [Measurement(num_tokens=count, straight_s=1e-3, split_s=ratio * 1e-3) for count, ratio in ratios.items()]


POINTS = st.dictionaries(st.integers(1, 1000), st.floats(0.3, 3.0), max_size=8).map(_points)


@pytest.mark.parametrize(
    ("ratios", "threshold"),
    [
        ({2: 1.3, 32: 1.1, 64: 0.9, 128: 0.8}, 64),
        ({128: 0.8, 2: 1.3, 64: 0.9, 32: 1.1}, 64),
        ({2: 0.9, 4: 0.8}, 2),
        ({2: 1.3, 64: 1.1}, None),
        ({}, None),
    ],
)
def test_splitting_begins_at_the_least_count_from_which_it_wins(ratios: dict[int, float], threshold: int | None) -> None:
    assert split_threshold(_points(ratios)) == threshold


def test_a_lucky_win_below_a_loss_does_not_count() -> None:
    assert split_threshold(_points({8: 0.9, 16: 1.1, 32: 0.9})) == 32
    assert split_threshold(_points({8: 0.9, 16: 0.9, 32: 1.01})) is None


def test_a_gain_within_noise_is_not_a_win() -> None:
    assert split_threshold(_points({32: 1 - MIN_GAIN / 2})) is None
    assert split_threshold(_points({32: 1 - MIN_GAIN * 1.01})) == 32


@given(points=POINTS)
def test_no_measured_count_that_loses_is_ever_split(points: list[Measurement]) -> None:
    threshold = split_threshold(points)
    for point in points:
        if threshold is not None and point.num_tokens >= threshold:
            assert point.split_s < point.straight_s


@given(points=POINTS.filter(lambda points: points == [] or split_threshold(points) is not None))
def test_regret_is_the_share_lost_at_the_worst_count(points: list[Measurement]) -> None:
    threshold = split_threshold(points)
    lost = [max(point.straight_s / point.split_s - 1, 0) for point in points if threshold and point.num_tokens < threshold]
    assert worst_regret(points, threshold) == pytest.approx(max(lost, default=0))


def test_regret_counts_steps_split_in_vain_too() -> None:
    assert worst_regret(_points({8: 1.25, 64: 0.5}), 8) == pytest.approx(0.25)
    assert worst_regret(_points({8: 1.25, 64: 0.5}), None) == pytest.approx(1.0)


def test_repeats_are_summarised_by_their_medians() -> None:
    point = summarise(16, [3.0, 1.0, 2.0, 90.0, 1.5], [1.0, 5.0, 4.0])
    assert (point.num_tokens, point.straight_s, point.split_s) == (16, 2.0, 4.0)
    assert not point.wins


@pytest.mark.parametrize(("most", "counts"), [(0, ()), (1, ()), (2, (2,)), (8, (2, 4, 8)), (100, (2, 4, 8, 16, 32, 64, 100))])
def test_counts_to_measure_double_up_to_the_most(most: int, counts: tuple[int, ...]) -> None:
    assert counts_to_measure(most) == counts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"straight_s": 0.0}, "straight_s at 4 tokens must be a positive time, got 0.0"),
        ({"split_s": float("nan")}, "split_s at 4 tokens must be a positive time, got nan"),
    ],
)
def test_an_impossible_timing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Measurement(**{"num_tokens": 4, "straight_s": 1.0, "split_s": 1.0, **change})


def test_a_count_measured_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"measured twice: \[8, 8\]"):
        split_threshold(_points({8: 0.9}) * 2)


@pytest.fixture
def profile() -> Profile:
    """Prefill pays from 64 tokens on, decode never."""
    modes = {"prefill": tuple(_points({32: 1.1, 64: 0.8})), "decode": tuple(_points({8: 1.3, 16: 1.2}))}
    return Profile(hardware="2 x Xeon", date="2026-10-01", layout=LAYOUT, modes=modes)


def test_a_profile_comes_back_from_its_file(tmp_path: Path, profile: Profile) -> None:
    write_profile(profile, tmp_path / "tbo.json")
    read = read_profile(tmp_path / "tbo.json", layout=LAYOUT, modes=MODES)
    assert read == profile
    assert read.thresholds() == {"prefill": 64, "decode": None}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({**LAYOUT, "ep_size": 4}, "measured with ep_size 2, this server has 4; give this layout's own file, or start without"),
        ({**LAYOUT, "attn_tp_size": 2}, "measured with attn_tp_size absent, this server has 2"),
        ({"ep_size": 2, "dp_size": 2}, "measured with moe_a2a_backend torch, this server has absent"),
    ],
)
def test_another_layouts_profile_is_refused_naming_what_differs(
    tmp_path: Path, profile: Profile, layout: dict[str, int | str], message: str
) -> None:
    write_profile(profile, tmp_path / "tbo.json")
    with pytest.raises(BadProfile, match=message):
        read_profile(tmp_path / "tbo.json", layout=layout, modes=MODES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a calibration profile: field 'format' must be 'moesaic-tbo-profile'"),
        ({"version": 7}, "version 7 of the profile, this release reads 1: measure anew"),
        ({"hardware": None}, "field 'hardware' must be text, got NoneType"),
        ({"layout": 3}, "field 'layout' must be an object, got int"),
        ({"modes": {"decode": []}}, r"field 'modes' must hold \['decode', 'prefill'\], it holds \['decode'\]"),
        ({"modes": {"decode": [], "prefill": 3}}, "mode 'prefill' must hold a list of measurements, got int"),
        (
            {"modes": {"decode": [], "prefill": [{"num_tokens": 2, "split_s": 1}]}},
            "mode 'prefill': a measurement must hold .*'straight_s'.*, got",
        ),
        (
            {"modes": {"decode": [], "prefill": [{"num_tokens": 2, "split_s": 1, "straight_s": -1}]}},
            "mode 'prefill': straight_s at 2",
        ),
        (
            {"modes": {"decode": [], "prefill": [{"num_tokens": 2.5, "split_s": 1, "straight_s": 1}]}},
            "whole number of tokens.* got .*2.5",
        ),
        ({"modes": {"decode": [], "prefill": [{"num_tokens": 2, "split_s": 1, "straight_s": 1}] * 2}}, "measured twice"),
    ],
)
def test_a_damaged_profile_is_refused_naming_the_field(
    tmp_path: Path, profile: Profile, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "tbo.json"
    write_profile(profile, file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BadProfile, match=f"tbo.json: .*{message}"):
        read_profile(file, layout=LAYOUT, modes=MODES)


def test_a_file_that_is_absent_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadProfile, match=r"none.json: can't be read: No such file"):
        read_profile(tmp_path / "none.json", layout=LAYOUT, modes=MODES)
    (tmp_path / "text.json").write_text("splits from 64")
    with pytest.raises(BadProfile, match=r"text.json: not JSON"):
        read_profile(tmp_path / "text.json", layout=LAYOUT, modes=MODES)
