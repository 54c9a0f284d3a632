"""Servers and checkpoints that the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from http_server import write_tokenizer
from live_server import LiveServer
from tiny_models import TinyModel

DP2 = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch", "--max-total-tokens", "2048")


@pytest.fixture(scope="session")
def model(tiny: Callable[..., TinyModel]) -> TinyModel:
    """A tiny checkpoint with a tokenizer."""
    made = tiny("plain", vocab_size=512)
    write_tokenizer(made.folder)
    return made


@pytest.fixture(scope="session")
def server(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two ranks, DP attention 2, EP 2."""
    with LiveServer(model.folder, tmp_path_factory.mktemp("serve") / "log", *DP2) as running:
        yield running
