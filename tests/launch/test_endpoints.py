"""The private folder of a server of one node: removed at its end, and by the next server when it could not be."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.launch.config import ServerConfig
from moesaic.launch.endpoints import plan_endpoints


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short: a socket's path has a limit."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def test_the_folder_is_gone_after_the_server() -> None:
    with plan_endpoints(ServerConfig(model_path="m")) as endpoints:
        assert endpoints.folder is not None
        assert endpoints.folder.is_dir()
    assert not endpoints.folder.exists()


def test_what_a_killed_server_left_is_removed_and_a_living_ones_stays() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    parent = Path(tempfile.gettempdir())
    orphan, other = parent / f"moesaic-{ended.pid}-abc", parent / "moesaic-1-abc"
    unrelated = parent / "moesaic-http-abc"
    for folder in (orphan, other, unrelated):
        folder.mkdir()
    with plan_endpoints(ServerConfig(model_path="m")):
        assert not orphan.exists()
        assert other.exists()
        assert unrelated.exists()
