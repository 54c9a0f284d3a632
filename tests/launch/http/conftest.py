"""Servers shared by the tests of a module: starting one takes a fraction of a second, but there are many tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import HttpServer, write_tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[HttpServer]:
    with HttpServer(model_path, dp_size=2) as server:
        yield server
