"""What the launcher's tests share: specs for stand-in ranks, and a patient wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.launch.config import ServerConfig
from moesaic.launch.engine.rank_spec import RankSpec
from moesaic.launch.hardware import Hardware
from moesaic.launch.resolution import resolve
from moesaic.launch.topology import ModelShape

STANDINS = Path(__file__).parent / "standins"


@pytest.fixture
def make_specs() -> Callable[[int], list[RankSpec]]:
    """Specs of so many ranks, with endpoints that nobody listens on."""

    def make(num_ranks: int) -> list[RankSpec]:
        shape = ModelShape(
            num_heads=num_ranks,
            num_experts=num_ranks,
            moe_intermediate_size=num_ranks,
            intermediate_size=num_ranks,
            vocab_size=num_ranks,
            context_length=64,
        )
        config = ServerConfig(model_path="none", tp_size=num_ranks, device="cpu", num_threads=1)
        resolution = resolve(config, shape, Hardware(num_cores=2))
        return [
            RankSpec(
                config=resolution.config,
                topology=resolution.topology,
                place=place,
                dist_init_method="tcp://127.0.0.1:1",
                to_rank_endpoint="ipc:///nowhere/to",
                from_rank_endpoint="ipc:///nowhere/from",
            )
            for place in resolution.topology.places()
        ]

    return make


@pytest.fixture
def standin_environment(tmp_path: Path) -> dict[str, str]:
    """What a rank process needs to find the stand-ins and to leave a note."""
    return {"PYTHONPATH": str(STANDINS), "STANDIN_NOTE": str(tmp_path / "note")}


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Poll a condition; fail when it has not come true in time."""

    def wait(condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"this has not come true within {seconds} s"
            time.sleep(0.01)

    return wait
