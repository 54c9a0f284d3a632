"""The tokenizer is looked at before any weight is read."""

from __future__ import annotations

from pathlib import Path

from http_server import write_tokenizer

from moesaic.launch.config import ServerConfig
from moesaic.launch.preflight.findings import Finding
from moesaic.launch.preflight.tokenizer_files import check_tokenizer


def check(folder: Path, node_rank: int = 0) -> Finding:
    return check_tokenizer(ServerConfig(model_path="m", tokenizer_path=str(folder), node_rank=node_rank))


def test_what_is_there_is_said_and_what_is_not_is_no_surprise_later(tmp_path: Path) -> None:
    assert check(write_tokenizer(tmp_path / "whole")).found.endswith(" tokens, a chat template")
    assert "/v1/chat/completions is refused" in check(write_tokenizer(tmp_path / "bare", template=None)).found
    assert check(tmp_path / "nowhere").status == "fail"
    assert check(tmp_path / "nowhere", node_rank=1).status == "ok"
    assert (check(tmp_path).status, "token ids" in check(tmp_path).remedy) == ("warn", True)
    (tmp_path / "tokenizer.json").write_text("{")
    broken = check(tmp_path)
    assert broken.status == "fail" and str(tmp_path / "tokenizer.json") in broken.found
