"""Finds the stand-in of a CUDA device (tests/standins/cuda_device), and runs engines on it while their waits are counted."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import interpreter  # noqa: F401  before anything that imports Triton
import torch
from engine_jobs import EngineSettings, Finished, collect, make_engine
from rank_pool import group_of

from moesaic.launch.engine.messages import GenerateRequest, every_output
from moesaic.launch.engine.process_groups import NewGroup

STANDINS = str(Path(__file__).parents[1] / "standins")
if STANDINS not in sys.path:
    sys.path.insert(0, STANDINS)

from cuda_device import DeviceTensor, Seen, installed  # noqa: E402

__all__ = ["DeviceRun", "DeviceTensor", "Seen", "device_job", "installed", "run_on_device"]


@dataclass(frozen=True)
class DeviceRun:
    """`finished` requests; for each call that launched a step that only decodes, while another such ran: whether it replays a
    graph, and every wait during the call, in words.
    """

    finished: dict[int, Finished]
    decode_waits: list[tuple[bool, list[str]]]


def run_on_device(
    settings: EngineSettings, waves: list[list[GenerateRequest]], rank: int = 0, new_group: NewGroup = group_of
) -> DeviceRun:
    """All requests of a wave, then the next wave, on one rank's stand-in device."""
    torch.set_num_threads(1)
    finished: dict[int, Finished] = {}
    decode_waits = []
    with installed() as seen:
        engine = make_engine(settings, rank, new_group)
        for wave in waves:
            for request in wave:
                engine.apply(request)
            extended = False
            while True:
                mark = len(seen.waits)
                result = engine.step()
                collect(finished, every_output(result.outputs, result.rids, result.tokens))
                if result.step.quiet:
                    break
                if not result.step.idle and not result.step.extends and not extended:
                    decode_waits.append((result.step.graph is not None, [str(each) for each in seen.since(mark)]))
                extended = result.step.extends
        engine.close()
    return DeviceRun(finished, decode_waits)


def device_job(rank: int, settings: EngineSettings, requests: list[GenerateRequest]) -> DeviceRun:
    """Job for a RankPool: request i goes to DP rank i % dp."""
    own = [request for i, request in enumerate(requests) if i % settings.dp == settings.topology.place(rank).dp_rank]
    return run_on_device(settings, [own], rank)
