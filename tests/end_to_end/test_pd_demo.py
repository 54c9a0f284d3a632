"""`moesaic pd-demo` and `moesaic router`: the commands of the README."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from http_server import wait_for
from live_server import free_port, is_alive
from tiny_models import TinyModel

from moesaic.launch.errors import ConfigError
from moesaic.launch.pd_demo import plan_demo
from moesaic.launch.router_cli import router_command


def test_the_demo_serves_and_ctrl_c_stops_all_of_it(model: TinyModel, tmp_path: Path) -> None:
    port = free_port(following=4)
    flags = "--device cpu --num-threads 1 --max-total-tokens 1024"
    command = [sys.executable, "-P", "-m", "moesaic.launch.cli", "pd-demo", "--port", str(port), "--model-path", str(model.folder)]
    command += ["--prefill-flags", flags, "--decode-flags", flags]
    log = tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            wait_for(lambda: process.poll() is not None or "serving (Ctrl-C" in log.read_text(), 90)
            assert "client -> router" in log.read_text() and "def add(a, b):" in log.read_text(), log.read_text()
            assert "the request failed" not in log.read_text()
            body = {"input_ids": [9, 8, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}}
            answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=20)
            assert answer.json()["output_ids"] == model.greedy([9, 8, 7], 4)
            children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
            assert len(children) == 3
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not any(is_alive(pid) for pid in children)


def test_the_router_gets_defaults_only_where_nothing_is_given() -> None:
    command = router_command(["--pd-disaggregation", "--port", "9", "--decode-policy=random"])
    assert command.count("--port") == 1 and command[command.index("--prefill-policy") + 1] == "round_robin"
    assert "--decode-policy" not in command
    assert "--prefill-policy" not in router_command(["--worker-urls", "http://a"])
    assert "power_of_two" in router_command(["--pd-disaggregation", "--decode", "http://a", "--decode", "http://b"])


def test_ports_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one up to 65531"):
        plan_demo(["--port", "65534"])
