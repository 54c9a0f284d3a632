"""The second part of bench_pd.py: long prompts arriving among running decodes, on one server and on a prefill and a decode server.

Two ranks of one thread each either way: unified (tp 2, dp 2, DP attention, chunked prefill), or prefill and decode with one rank
each over tcp. Real `moesaic serve` processes with the demo model, and one client that sends to them directly: with a role, each
request to both, as a router does. A fixed number of short requests decode at any time; long prompts arrive at fixed times.
Gaps between tokens are those of the short requests, as the client sees them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from bench_serving import percentiles
from live_server import LiveServer
from pd_servers import pd_pair

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.demo.config import DemoConfig

SHORT_TOKENS, SHORT_OUTPUT, LONG_OUTPUT = 32, 300, 16
KV_TOKENS = 32_768
VOCAB_SIZE = DemoConfig().vocab_size
WARMUP_S = 5.0
HANDOVER = "moesaic:kv_handover_latency_ms"


@dataclass(frozen=True, kw_only=True)
class Load:
    """`chunk`: prompt tokens per step of each rank that prefills; None: the server's own choice."""

    seconds: float
    running: int
    long_tokens: int
    interval_s: float
    chunk: int | None

    def chunk_flags(self, dp_size: int) -> tuple[str, ...]:
        return () if self.chunk is None else ("--chunked-prefill-size", str(self.chunk * dp_size))


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to send. With `bootstrap_port`, every request goes to `prefill` as well, with a room."""

    url: str
    prefill: str | None = None
    bootstrap_port: int | None = None


@dataclass(kw_only=True)
class Figures:
    """Seconds. `gaps`: between tokens of short requests. `handovers`: from prefill's last chunk to the first token, `followed`:
    from that to the first token that decode has computed itself (of long requests, one each).
    """

    gaps: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    long_ttfts: list[float] = field(default_factory=list)
    handovers: list[float] = field(default_factory=list)
    followed: list[float] = field(default_factory=list)

    @property
    def itl_p99_s(self) -> float:
        return percentiles(self.gaps)["p99"] / 1e3

    @property
    def step_s(self) -> float:
        return statistics.median(self.gaps)

    def handover_figures(self) -> dict[str, float]:
        """`handover_steps` and, with the step that computes it, the same for decode's own first token: medians."""
        steps = [each / self.step_s for each in self.handovers]
        own = [(each + after) / self.step_s for each, after in zip(self.handovers, self.followed, strict=True)]
        return {
            "handover_steps": round(statistics.median(steps), 3),
            "handover_steps_to_own_token": round(statistics.median(own), 3),
        }


class Client:
    """The load on one target."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, load: Load) -> None:
        self._session, self._target, self._load = session, target, load
        self._random = random.Random(0)
        self._rooms = itertools.count(1)
        self._start = time.perf_counter()
        self._last_handover = 0.0
        self.figures = Figures()

    async def run(self) -> Figures:
        """Warm up, then `load.seconds` that count. What still runs is given up."""
        decodes = [asyncio.create_task(self._decode(index)) for index in range(self._load.running)]
        prompts = asyncio.create_task(self._arrive())
        done, pending = await asyncio.wait(
            [*decodes, prompts], timeout=WARMUP_S + self._load.seconds, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        return self.figures

    @property
    def _counts(self) -> bool:
        return time.perf_counter() - self._start > WARMUP_S

    async def _decode(self, index: int) -> None:
        """One short request after the other; the first ones are shorter, so that they don't all end at once."""
        output = SHORT_OUTPUT * (index + 1) // self._load.running
        while True:
            await self._stream(SHORT_TOKENS, output, self.figures.ttfts, self.figures.gaps)
            output = SHORT_OUTPUT

    async def _arrive(self) -> None:
        """Long prompts at their times, whatever has become of those before."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._load.interval_s)
                group.create_task(self._long())

    async def _long(self) -> None:
        gaps: list[float] = []
        counts = self._counts
        await self._stream(self._load.long_tokens, LONG_OUTPUT, self.figures.long_ttfts, gaps)
        if self._target.prefill is None or not counts:
            return
        seconds = await self._handover_s()
        if seconds != self._last_handover:
            self._last_handover = seconds
            self.figures.handovers.append(seconds)
            self.figures.followed.append(gaps[0])

    async def _stream(self, num_tokens: int, output: int, ttfts: list[float], gaps: list[float]) -> None:
        body: dict[str, Any] = {
            "input_ids": [self._random.randrange(10, VOCAB_SIZE) for _ in range(num_tokens)],
            "sampling_params": {"temperature": 0, "max_new_tokens": output, "ignore_eos": True},
        }
        if self._target.prefill is None:
            await self._tokens(body, ttfts, gaps)
            return
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self._target.bootstrap_port, "bootstrap_room": next(self._rooms)}
        await asyncio.gather(self._prefill({**body, **room}), self._tokens({**body, **room}, ttfts, gaps))

    async def _prefill(self, body: Mapping[str, Any]) -> None:
        async with self._session.post(f"{self._target.prefill}/generate", json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def _tokens(self, body: Mapping[str, Any], ttfts: list[float], gaps: list[float]) -> None:
        """The times of one streamed request; those of the warm-up are left out."""
        begun = time.perf_counter()
        last: float | None = None
        async with self._session.post(f"{self._target.url}/generate", json={**body, "stream": True}) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                if self._counts and last is None:
                    ttfts.append(now - begun)
                elif self._counts and last is not None:
                    gaps.append(now - last)
                last = now

    async def _handover_s(self) -> float:
        """Of the last request that decode has taken over."""
        async with self._session.get(f"{self._target.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return float(next(line for line in lines if line.startswith(HANDOVER + "{")).split()[-1]) / 1e3


async def _load_on(url: str, load: Load, prefill: str | None = None, bootstrap_port: int | None = None) -> Figures:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        target = Target(url=url, prefill=prefill, bootstrap_port=bootstrap_port)
        return await Client(session, target, load).run()


def measure_load(load: Load) -> tuple[Figures, Figures]:
    """The unified server's figures and PD's, one after the other; prints a table."""
    prefill_text = "the server's chunks" if load.chunk is None else f"chunks of {load.chunk}"
    print(f"{load.running} running decodes; every {load.interval_s:g} s a prompt of {load.long_tokens} tokens, in {prefill_text}")
    with tempfile.TemporaryDirectory(prefix="moesaic-bench-pd-") as name:
        folder = Path(name)
        memory = ("--max-total-tokens", str(KV_TOKENS))
        layout = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch")
        with LiveServer(CHECKPOINT_DIR, folder / "unified.log", *layout, *memory, *load.chunk_flags(2)) as server:
            unified = asyncio.run(_load_on(server.url, load))
        with pd_pair(CHECKPOINT_DIR, folder, load.chunk_flags(1), tokens=KV_TOKENS) as pair:
            pd = asyncio.run(_load_on(pair.decode.url, load, pair.prefill.url, pair.bootstrap_port))
    _print_table({"unified": unified, "prefill + decode": pd})
    return unified, pd


def _print_table(rows: Mapping[str, Figures]) -> None:
    columns = ("ITL p50 ms", "p90", "p99", "max", "tokens", "TTFT p50 ms", "long TTFT p50", "long p99")
    print(f"{'':<18}" + "".join(f"{column:>14}" for column in columns))
    for name, figures in rows.items():
        itl, ttft, long_ttft = (percentiles(values) for values in (figures.gaps, figures.ttfts, figures.long_ttfts))
        values = (itl["p50"], itl["p90"], itl["p99"], max(figures.gaps) * 1e3, len(figures.gaps))
        cells = (*values, ttft["p50"], long_ttft["p50"], long_ttft["p99"])
        print(f"{name:<18}" + "".join(f"{value:>14.1f}" for value in cells))
    for figures in rows.values():
        if figures.handovers:
            found = percentiles(figures.handovers)
            print(
                f"from prefill's last chunk to decode's first token: p50 {found['p50']:.1f} ms, p90 {found['p90']:.1f} ms, "
                f"{len(figures.handovers)} requests; a decode step: {figures.step_s * 1e3:.1f} ms"
            )


def draw(load: Load, unified: Figures, pd: Figures, path: Path) -> None:
    """Which share of the gaps is longer than so many ms, both on one pair of logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), dpi=120)
    for label, figures, colour in (("one server, 2 ranks", unified, "#c44e52"), ("prefill + decode, 1 rank each", pd, "#4c72b0")):
        gaps = sorted(1e3 * gap for gap in figures.gaps)
        longer = [100 * (1 - index / len(gaps)) for index in range(len(gaps))]
        p99 = figures.itl_p99_s * 1e3
        axes.step(gaps, longer, where="post", color=colour, label=f"{label}: p99 {p99:.0f} ms")
        axes.plot([p99], [1.0], "o", color=colour)
    axes.axhline(1.0, color="#999999", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="time between two tokens, ms", ylabel="share of gaps that are longer, %")
    axes.set_xlim(left=1.0)
    axes.set_title(f"{load.running} running decodes, a {load.long_tokens}-token prompt every {load.interval_s:g} s", fontsize=11)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25, which="both")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
