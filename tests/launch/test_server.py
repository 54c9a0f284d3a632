"""`moesaic serve` as a process: refused starts, a clean stop, and what happens when a rank or a node dies.

The ranks are stand-ins that speak the engine's messages; everything else is real.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import free_port

from moesaic.launch.cli import main

STANDINS = Path(__file__).parent / "standins"
# The command line, with stand-ins in place of the engine's ranks.
SERVE = f"""
import functools, sys
import moesaic.launch.server as server
from moesaic.launch.cli import main
server.WorkerGroup = functools.partial(
    server.WorkerGroup, entry="standin_rank:serve", environment={{"PYTHONPATH": {str(STANDINS)!r}}}
)
sys.exit(main(["serve", *sys.argv[1:]]))
"""
MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "qk_nope_head_dim": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
DP2 = ["--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch", "--device", "cpu"]


class Server:
    """A `moesaic serve` process, its output in a file."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.port = free_port()
        self.log = folder / f"{self.port}.log"
        command = [sys.executable, "-P", "-c", SERVE, "--model-path", str(folder), "--load-format", "dummy"]
        command += ["--port", str(self.port), *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        # Read while it is written: it may end within a character.
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> dict[int, int]:
        """Process id by rank, as `ps` would show them."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"\nPPid:\t{self.process.pid}\n" in (entry / "status").read_text():
                    command = (entry / "cmdline").read_text().split("\0")
                    found[int(command[4].rpartition("rank")[2])] = int(entry.name)
            except (OSError, IndexError, ValueError):
                continue
        return found

    def request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or b"null")


StartServer = Callable[..., Server]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


@pytest.fixture
def start(model_folder: Path) -> Iterator[StartServer]:
    servers: list[Server] = []

    def run(*flags: str) -> Server:
        servers.append(Server(model_folder, list(flags)))
        return servers[-1]

    yield run
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_a_server_serves_and_ends_cleanly_with_no_process_left(start: StartServer, wait_until: Callable[..., None]) -> None:
    server = start(*DP2)
    wait_until(lambda: "Ctrl-C stops it" in server.output, 30)
    ranks = server.ranks()
    answer = server.request("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}})
    info = server.request("/server_info")

    server.process.send_signal(signal.SIGINT)
    code = server.process.wait(10)

    assert (answer["output_ids"], code) == ([3], 0)
    assert info["dp_size"] == 2 and {row["capability"] for row in info["resolution"]} >= {"device", "dispatch"}
    assert sorted(ranks) == [0, 1] and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    for shown in ("2 ranks on 1 node", "resolution report", "load weights", "curl -s http", "from openai import OpenAI"):
        assert shown in server.output


def test_it_stops_when_nobody_reads_its_output_any_more(model_folder: Path) -> None:
    command = [sys.executable, "-P", "-c", SERVE, "--model-path", str(model_folder), "--load-format", "dummy", *DP2]
    server = subprocess.Popen([*command, "--port", str(free_port())], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout is not None
        while b"Ctrl-C stops it" not in server.stdout.readline():
            assert server.poll() is None
        server.stdout.close()
        server.send_signal(signal.SIGINT)
        server.wait(10)
    finally:
        server.kill()
        server.wait()


def test_when_a_rank_dies_clients_hear_of_it_and_the_server_ends_naming_it(
    start: StartServer, wait_until: Callable[..., None]
) -> None:
    server = start(*DP2, "--skip-server-warmup")
    wait_until(lambda: "Ctrl-C stops it" in server.output, 30)
    ranks = server.ranks()

    with ThreadPoolExecutor(1) as pool:
        # The stand-in never answers this one.
        waiting = pool.submit(server.request, "/generate", {"input_ids": [9]})
        time.sleep(0.5)
        os.kill(ranks[1], signal.SIGKILL)
        killed_at = time.monotonic()
        failure = waiting.exception(timeout=10)

    assert isinstance(failure, urllib.error.HTTPError) and failure.code == 503
    assert "rank 1" in failure.read().decode()
    assert server.process.wait(10) == 1
    assert time.monotonic() - killed_at < 5
    assert f"moesaic serve: rank 1 (pid {ranks[1]}) was killed by SIGKILL" in server.output
    assert not Path(f"/proc/{ranks[0]}").exists()


def test_a_rank_that_dies_on_one_node_ends_both_and_both_name_it(start: StartServer, wait_until: Callable[..., None]) -> None:
    first, second = start_two_nodes(start)
    wait_until(lambda: "Ctrl-C stops it" in first.output, 30)
    victim = second.ranks()[1]

    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    codes = [server.process.wait(10) for server in (first, second)]

    assert codes == [1, 1] and time.monotonic() - killed_at < 5
    for server in (first, second):
        assert f"rank 1 (pid {victim}) was killed by SIGKILL" in server.output


def start_two_nodes(start: StartServer) -> tuple[Server, Server]:
    flags = [*DP2, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}", "--dist-timeout", "20"]
    return start(*flags), start(*flags, "--node-rank", "1")


def test_a_taken_port_is_refused_before_anything_starts(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        assert main(["serve", "--model-path", str(model_folder), "--device", "cpu", "--port", str(port)]) == 2

    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in capsys.readouterr().err


def test_a_model_without_weights_is_refused_before_any_rank_starts(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-path", str(model_folder), "--device", "cpu", "--port", str(free_port())]) == 2

    error = capsys.readouterr().err
    assert "this node is not ready (`moesaic preflight` looks further)" in error
    assert f"model files: {model_folder} holds no safetensors" in error


@pytest.mark.parametrize(
    ("config", "flags", "wanted"),
    [
        (None, [], "config.json does not exist"),
        ({"architectures": ["LlamaForCausalLM"]}, [], "LlamaForCausalLM"),
        (MODEL, ["--tp", "4", "--dp", "3"], "--tp-size 4 --dp-size 3"),
        (MODEL, ["--tp", "8"], "2 attention heads"),
        (MODEL, ["--strict", "--device", "auto"], "--strict allows no automatic downgrade"),
    ],
)
def test_a_start_that_cannot_work_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any] | None, flags: list[str], wanted: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    assert main(["serve", "--model-path", str(tmp_path), "--port", str(free_port()), *flags]) == 2

    error = capsys.readouterr().err
    assert error.startswith("moesaic serve: ") and wanted in error
    assert "Traceback" not in error
