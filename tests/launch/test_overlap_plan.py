"""From the flags of overlap to what the ranks are told: what is refused, and in which words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import TinyModel

from moesaic.launch.config import ServerConfig
from moesaic.launch.endpoints import plan_endpoints
from moesaic.launch.errors import ConfigError
from moesaic.launch.multi_node import rank_specs
from moesaic.launch.overlap_report import render_profile, threshold_words
from moesaic.launch.startup import Plan, make_plan, shared_settings
from moesaic.overlap.calibration import Measurement, Profile, write_profile

EP2 = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "torch", "device": "cpu"}
TWO_BATCH = {**EP2, "enable_two_batch_overlap": True}
MODES = {
    "prefill": (
        Measurement(num_tokens=32, straight_s=0.002, split_s=0.003),
        Measurement(num_tokens=64, straight_s=0.004, split_s=0.003),
    ),
    "decode": (Measurement(num_tokens=8, straight_s=0.001, split_s=0.002),),
}

MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tiny: Callable[..., TinyModel]) -> MakePlan:
    def make(**flags: Any) -> Plan:
        return make_plan(ServerConfig(model_path=str(tiny("plain").folder), **flags))

    return make


@pytest.fixture
def profile(plan: MakePlan, tmp_path: Path) -> Path:
    """A profile for the layout of TWO_BATCH, as a file."""
    thresholds = plan(**TWO_BATCH).overlap.thresholds
    assert thresholds is not None
    path = tmp_path / "tbo.json"
    write_profile(Profile(hardware="2 x Xeon", date="2026-10-01", layout=thresholds.layout, modes=MODES), path)
    return path


def _row(made: Plan, capability: str) -> str:
    return next(choice.chosen for choice in made.resolution.choices if choice.capability == capability)


def test_overlap_within_and_between_batches_is_off_unless_asked_for(plan: MakePlan) -> None:
    made = plan(**EP2)
    assert made.overlap.thresholds is None
    assert not made.resolution.config.two_batch_overlap
    assert not made.resolution.config.single_batch_overlap
    assert (_row(made, "two-batch overlap"), _row(made, "single-batch overlap")) == ("off", "off")


def test_without_a_profile_the_ranks_are_told_to_measure(plan: MakePlan) -> None:
    made = plan(**TWO_BATCH, tbo_token_distribution_threshold=0.3)
    thresholds = made.overlap.thresholds
    assert thresholds is not None
    assert (thresholds.profile, thresholds.save_to) == (None, None)
    assert thresholds.hardware.startswith("2 ranks x ")
    assert made.resolution.config.tbo_token_distribution_threshold == 0.3
    assert "are measured when the ranks start" in _row(made, "two-batch overlap")


def test_both_overlaps_go_together(plan: MakePlan) -> None:
    made = plan(**TWO_BATCH, enable_single_batch_overlap=True)
    assert made.resolution.config.single_batch_overlap
    assert "in steps that are not split" in _row(made, "single-batch overlap")


def test_a_profile_that_exists_is_read_and_its_sizes_are_reported(plan: MakePlan, profile: Path) -> None:
    made = plan(**TWO_BATCH, tbo_profile=str(profile))
    thresholds = made.overlap.thresholds
    assert thresholds is not None
    assert thresholds.profile is not None
    assert (thresholds.profile.modes, thresholds.save_to) == (MODES, None)
    row = _row(made, "two-batch overlap")
    assert "prefill from 64 tokens per DP rank, decode never" in row
    assert "measured on 2 x Xeon on 2026-10-01" in row


def test_a_profile_that_does_not_exist_will_be_written(plan: MakePlan, tmp_path: Path) -> None:
    made = plan(**TWO_BATCH, tbo_profile=str(tmp_path / "new.json"))
    thresholds = made.overlap.thresholds
    assert thresholds is not None
    assert (thresholds.profile, thresholds.save_to) == (None, str(tmp_path / "new.json"))
    assert str(tmp_path / "new.json") in _row(made, "two-batch overlap")


def test_only_node_0_reads_and_writes_the_profile(plan: MakePlan, profile: Path, tmp_path: Path) -> None:
    nodes = {"nnodes": 2, "dist_init_addr": "127.0.0.1:5000"}
    for file in (profile, tmp_path / "new.json"):
        made = plan(**TWO_BATCH, **nodes, node_rank=1, tbo_profile=str(file))
        assert "--tbo-profile" not in shared_settings(made)
        assert made.overlap.thresholds is not None
        assert (made.overlap.thresholds.profile, made.overlap.thresholds.save_to) == (None, None)
        assert "node 0" in _row(made, "two-batch overlap")


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        ({"moe_a2a_backend": "none", "ep_size": 2}, "moe_a2a_backend torch, this server has none"),
        ({"dp_size": 1, "enable_dp_attention": False}, "dp_size 2, this server has 1"),
        ({"enable_single_batch_overlap": True}, "single_batch_overlap off, this server has on"),
        ({"deepep_mode": "normal"}, "deepep_mode auto, this server has normal"),
    ],
)
def test_a_profile_of_another_layout_is_refused(plan: MakePlan, profile: Path, flags: dict[str, Any], differs: str) -> None:
    with pytest.raises(ConfigError, match=rf"--tbo-profile {profile}: measured .*with {differs}"):
        plan(**{**TWO_BATCH, **flags}, tbo_profile=str(profile))


def test_a_profile_that_is_none_or_has_no_place_is_refused(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ConfigError, match=r"--tbo-profile .*text: not a calibration profile"):
        plan(**TWO_BATCH, tbo_profile=str(tmp_path / "text"))
    with pytest.raises(ConfigError, match=r"does not exist and can't be written: .*nowhere is no folder"):
        plan(**TWO_BATCH, tbo_profile=str(tmp_path / "nowhere" / "tbo.json"))
    with pytest.raises(ConfigError, match=r"can't be read: Is a directory"):
        plan(**TWO_BATCH, tbo_profile=str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({**EP2, "tbo_profile": "f"}, ("--tbo-profile f without --enable-two-batch-overlap", "no effect")),
        (
            {**EP2, "tbo_token_distribution_threshold": 0.2},
            ("--tbo-token-distribution-threshold 0.2 without --enable-two-batch-overlap",),
        ),
        ({"enable_two_batch_overlap": True}, ("--enable-two-batch-overlap with --tp-size 1", "a single rank sends nothing")),
        ({"enable_single_batch_overlap": True}, ("--enable-single-batch-overlap with --tp-size 1",)),
    ],
)
def test_flags_without_effect_are_refused(plan: MakePlan, flags: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**{"device": "cpu", **flags})
    assert all(word in str(caught.value) for word in words)


def test_a_default_that_is_spelled_out_asks_for_nothing(plan: MakePlan) -> None:
    plan(**EP2, tbo_token_distribution_threshold=0.48)


def test_a_model_without_sparse_layers_has_nothing_to_overlap(tmp_path: Path, tiny: Callable[..., TinyModel]) -> None:
    config = json.loads((tiny("plain").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "first_k_dense_replace": config["num_hidden_layers"]}))
    for flag in ("enable_two_batch_overlap", "enable_single_batch_overlap"):
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}: .*no sparse layers"):
            make_plan(ServerConfig(model_path=str(tmp_path), **EP2, **{flag: True}))


def test_the_ranks_are_told(plan: MakePlan, profile: Path) -> None:
    made = plan(**TWO_BATCH, tbo_profile=str(profile))

    with plan_endpoints(made.config) as endpoints:
        assert [spec.thresholds for spec in rank_specs(made, endpoints)] == [made.overlap.thresholds] * 2


def test_the_table_shows_what_runs_at_each_size() -> None:
    profile = Profile(hardware="2 x Xeon", date="2026-10-01", layout={}, modes=MODES)
    console = Console(width=140, file=io.StringIO())
    with console.capture() as shown:
        console.print(render_profile(profile))
    lines = [line.replace("│", " ").split() for line in shown.get().splitlines()]
    assert ["32", "2.00", "3.00", "straight"] in lines
    assert ["64", "4.00", "3.00", "split"] in lines
    assert ["8", "1.00", "2.00", "straight"] in lines
    assert threshold_words(profile) == "prefill from 64 tokens per DP rank, decode never"
