"""Shared fixtures: things that are dear to start are started once per session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # noqa: F401  before anything that imports Triton (transformers does)
import pytest
import torch
from rank_pool import RankPool
from tiny_models import TinyModel, make_tiny_model

torch.set_num_threads(1)
# nixl's wheel brings a libnl that crashes a process at its end once UCX's InfiniBand module has loaded it. (Ranks end by os._exit.)
os.environ.setdefault("UCX_MODULES", "^ib")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Gloo workers for distributed tests."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """`tiny(variant, **overrides)`: a tiny random checkpoint with its oracle, made once per session."""
    made: dict[str, TinyModel] = {}

    def get(variant: str = "plain", **overrides: Any) -> TinyModel:
        key = f"{variant}{sorted(overrides.items())}"
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(variant), variant, **overrides)
        return made[key]

    return get
