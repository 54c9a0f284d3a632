"""What a person sees while a server starts: banner, tables, progress, and a request to paste.

Knows no process; it is told what happens. On a terminal there are bars; elsewhere one line per phase.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from moesaic.launch.disaggregation.roles import render_suitability
from moesaic.launch.engine import messages
from moesaic.launch.memory_plan import render_memory
from moesaic.launch.overlap_report import render_profile
from moesaic.launch.report import render_report
from moesaic.launch.startup import Plan
from moesaic.launch.topology import render_topology, summarize_topology
from moesaic.launch.version import version

MAX_BARS = 16
PIPE_WIDTH = 140
# To try the server with; the same as in the README.
REQUEST = {"prompt": "with open(filename) as", "max_tokens": 48, "temperature": 0, "repetition_penalty": 1.1}


def make_console() -> Console:
    """The terminal; a file or pipe gets tables wide enough to read, and no colours."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def show_plan(console: Console, plan: Plan) -> None:
    """Banner, topology, resolution report and memory plan."""
    config = plan.config
    console.print(f"[bold]moesaic {version()}[/bold]  {plan.model.architecture}  {config.model_path}", highlight=False)
    console.print(summarize_topology(plan.resolution.topology), highlight=False)
    num_slots = plan.shape.num_experts + config.ep_num_redundant_experts
    console.print(render_topology(plan.resolution.topology, num_slots))
    console.print("resolution report")
    console.print(render_report(plan.resolution.choices))
    console.print(render_memory(plan.memory))
    if config.disaggregation_mode != "null" or config.moe_a2a_backend != "none":
        console.print("what a dispatch mode is good for")
        console.print(_mode_table())


def _mode_table() -> Table:
    """Roles and modes against long input, long output, DP attention and graphs."""
    head, *rows = render_suitability()
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    return table


class StartupView:
    """Start-up progress of all ranks: a bar per rank for the phase it is in, and a line per phase once all have passed
    it.
    """

    def __init__(self, console: Console, world_size: int) -> None:
        self._console = console
        self._world_size = world_size
        self._bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
        self._tasks: dict[int, TaskID] = {}
        self._started: dict[str, float] = {}
        self._phases: dict[int, str] = {}
        self._passed: Counter[str] = Counter()
        self._ready: dict[int, messages.Ready] = {}
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def update(self, message: messages.Progress | messages.Ready) -> None:
        """Take one message of one rank. A rank leaves a phase by entering the next one or by being ready."""
        if isinstance(message, messages.Ready):
            self._leave_phase(message.rank)
            self._ready[message.rank] = message
            if len(self._ready) == self._world_size:
                self._show_sizes(message)
                self._show_overlap(self._ready[0].overlap_profile)
            return
        if self._phases.get(message.rank) != message.phase:
            self._leave_phase(message.rank)
            self._phases[message.rank] = message.phase
            self._started.setdefault(message.phase, time.monotonic())
        self._move_bar(message)

    def doing(self) -> str:
        """What most ranks are in now, in words."""
        if not self._phases:
            return "its processes begin" if not self._ready else "all ranks are ready"
        (phase, count), *_ = Counter(self._phases.values()).most_common(1)
        return f"{phase} ({count} of {self._world_size} ranks)"

    def _move_bar(self, message: messages.Progress) -> None:
        if message.rank >= MAX_BARS:
            return
        description = f"  rank {message.rank}: {message.phase}"
        if message.rank not in self._tasks:
            self._tasks[message.rank] = self._bars.add_task(description, total=None)
        # No total: the bar pulses.
        self._bars.update(self._tasks[message.rank], description=description, completed=message.done, total=message.total or None)

    def _leave_phase(self, rank: int) -> None:
        phase = self._phases.pop(rank, None)
        if phase is None:
            return
        self._passed[phase] += 1
        if self._passed[phase] == self._world_size:
            seconds = time.monotonic() - self._started[phase]
            self._console.print(f"  {phase:<20} {seconds:6.1f} s", highlight=False)

    def _show_sizes(self, ready: messages.Ready) -> None:
        seconds = time.monotonic() - self._begun
        ranks = "1 rank ready" if self._world_size == 1 else f"all {self._world_size} ranks ready"
        self._console.print(f"  {ranks:<20} {seconds:6.1f} s", highlight=False)
        self._console.print(
            f"  per DP rank {ready.max_total_num_tokens:,} KV tokens of {ready.kv_bytes_per_token:,} bytes; "
            f"{ready.weight_bytes / 2**20:,.0f} MiB of weights on rank {ready.rank}",
            highlight=False,
        )

    def _show_overlap(self, profile: messages.OverlapProfile | None) -> None:
        """What the resolution report could not know yet."""
        if profile is not None:
            self._console.print(render_profile(profile))


def show_ready(console: Console, plan: Plan) -> None:
    """Where the server is, and requests to paste."""
    config = plan.config
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"
    body = json.dumps({"model": plan.served_model_name, **REQUEST})
    # The key itself stays out of terminals and logs.
    authorization = ' -H "Authorization: Bearer $API_KEY"' if config.api_key else ""
    key = 'os.environ["API_KEY"]' if config.api_key else '"none"'
    model = json.dumps(plan.served_model_name)
    console.print(f"\nserving [bold]{plan.served_model_name}[/bold] at {url}   (Ctrl-C stops it)\n", highlight=False)
    # Plain print: what is meant to be pasted must be neither wrapped nor coloured.
    print(f"curl -s {url}/v1/completions -H 'Content-Type: application/json'{authorization} \\\n  -d '{body}'\n")
    print("import os\n" * bool(config.api_key) + "from openai import OpenAI")
    print(f'client = OpenAI(base_url="{url}/v1", api_key={key})')
    prompt, max_tokens = json.dumps(REQUEST["prompt"]), REQUEST["max_tokens"]
    print(f"answer = client.completions.create(model={model}, prompt={prompt}, max_tokens={max_tokens}, temperature=0)")
    print("print(answer.choices[0].text)\n", flush=True)
