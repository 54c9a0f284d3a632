"""`moesaic pd-demo`: a prefill server, a decode server and the router on this machine, with the demo model; Ctrl-C stops all of it.

Starts the same commands that a person would, and prints them. Knows nothing of what they do inside.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moesaic.launch.args import new_parser
from moesaic.launch.errors import ConfigError, RankFailedError
from moesaic.launch.flag_kinds import port_number
from moesaic.launch.router_cli import router_command

READY_S = 300.0
STOP_S = 15.0
PROMPT = "def add(a, b):"
HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class DemoPorts:
    """Five in a row, from the router's."""

    router: int

    @property
    def prefill(self) -> int:
        return self.router + 1

    @property
    def decode(self) -> int:
        return self.router + 2

    @property
    def bootstrap(self) -> int:
        return self.router + 3

    @property
    def prometheus(self) -> int:
        return self.router + 4


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """The commands, by the name of what they start; `ready`: the URL that answers 200 once it serves."""

    ports: DemoPorts
    commands: dict[str, list[str]]
    ready: dict[str, str]


def plan_demo(arguments: Sequence[str]) -> DemoPlan:
    """The arguments after `pd-demo` -> what to start. Raises ConfigError."""
    parser = new_parser("moesaic pd-demo", "Prefill, decode and router on this machine.")
    parser.add_argument("--port", type=port_number, default=8000, help="of the router; the four after it are used as well [8000]")
    parser.add_argument("--model-path", default="demo", metavar="DIR", help="[demo]")
    parser.add_argument("--prefill-flags", default="", metavar="FLAGS", help="further flags of the prefill server, in one word")
    parser.add_argument("--decode-flags", default="", metavar="FLAGS", help="further flags of the decode server, in one word")
    chosen = parser.parse_args(list(arguments))
    ports = DemoPorts(router=chosen.port)
    if ports.prometheus > 65535:
        raise ConfigError(f"--port {chosen.port}: the four ports after it are needed as well; choose one up to {65535 - 4}")
    serve = [sys.executable, "-P", "-m", "moesaic.launch.cli", "serve", "--model-path", chosen.model_path, "--host", HOST]
    common = [*serve, "--disaggregation-bootstrap-port", str(ports.bootstrap)]
    router = ["--pd-disaggregation", "--prefill", f"http://{HOST}:{ports.prefill}", str(ports.bootstrap)]
    router += ["--decode", f"http://{HOST}:{ports.decode}", "--host", HOST, "--port", str(ports.router)]
    return DemoPlan(
        ports=ports,
        commands={
            "prefill": [
                *common,
                "--disaggregation-mode",
                "prefill",
                "--port",
                str(ports.prefill),
                *shlex.split(chosen.prefill_flags),
            ],
            "decode": [*common, "--disaggregation-mode", "decode", "--port", str(ports.decode), *shlex.split(chosen.decode_flags)],
            "router": router_command([*router, "--prometheus-port", str(ports.prometheus)]),
        },
        ready={
            "prefill": f"http://{HOST}:{ports.prefill}/health",
            "decode": f"http://{HOST}:{ports.decode}/health",
            "router": f"http://{HOST}:{ports.router}/readiness",
        },
    )


def run_pd_demo(arguments: Sequence[str]) -> int:
    """Returns 0 once stopped by Ctrl-C. Raises ConfigError, or RankFailedError when one of the three ends by itself."""
    plan = plan_demo(arguments)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _Processes(Path(tempfile.mkdtemp(prefix="moesaic-pd-demo-"))) as processes:
            for name, command in plan.commands.items():
                processes.start(name, command)
                print(f"{name:<8} {shlex.join(command)}\n         log: {processes.log(name)}", flush=True)
            if _wait_ready(plan, processes, stop):
                _show(plan)
                while not stop.wait(0.5):
                    processes.check()
            print("stopping prefill, decode and router", flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _wait_ready(plan: DemoPlan, processes: _Processes, stop: threading.Event) -> bool:
    """Until all three serve; False when told to stop before."""
    deadline = time.monotonic() + READY_S
    for name, url in plan.ready.items():
        while not _answers(url):
            processes.check()
            if time.monotonic() > deadline:
                raise RankFailedError(f"{name} is not ready after {READY_S:g} s; its log: {processes.log(name)}")
            if stop.wait(0.2):
                return False
        print(f"{name:<8} ready", flush=True)
    return True


def _show(plan: DemoPlan) -> None:
    """The topology, and a request with its answer."""
    ports = plan.ports
    print(
        f"\n  client -> router :{ports.router} -> prefill :{ports.prefill} (bootstrap :{ports.bootstrap})"
        f"\n                        -> decode  :{ports.decode} <- KV pages, first token - prefill\n"
    )
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    url = f"http://{HOST}:{ports.router}/generate"
    print(f"curl -s {url} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'\n")
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _opener().open(request, timeout=60) as answer:
            print(f"{PROMPT}{json.load(answer)['text']}\n")
    except (OSError, ValueError, KeyError) as error:
        print(f"the request failed: {error}\n")
    print("serving (Ctrl-C stops all three)", flush=True)


def _answers(url: str) -> bool:
    try:
        with _opener().open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


class _Processes:
    """Children with a log each, in process groups of their own: a terminal's Ctrl-C reaches this process alone.

    The logs stay after an error.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_S
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        if kind is None:  # else the logs may tell why
            shutil.rmtree(self._folder, ignore_errors=True)

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def start(self, name: str, command: list[str]) -> None:
        with self.log(name).open("wb") as output:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )

    def check(self) -> None:
        """Raises RankFailedError when one has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                tail = self.log(name).read_text(encoding="utf-8", errors="replace")[-1500:]
                raise RankFailedError(f"{name} has ended with code {process.returncode}:\n{tail}")
