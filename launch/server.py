"""`moesaic serve`, put together: settle everything, show it, start the ranks, serve HTTP until told to stop, leave
nothing behind.

The composition root: it knows all the parts and does none of their work. Exit codes are those of `launch/cli.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import urllib.request
from collections.abc import Coroutine
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import refuse
from moesaic.launch.console import StartupView, make_console, show_plan, show_ready
from moesaic.launch.disaggregation.bootstrap import BootstrapServer
from moesaic.launch.endpoints import Endpoints, plan_endpoints
from moesaic.launch.errors import ConfigError, RankFailedError
from moesaic.launch.http.client import RankClient
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.errors import EngineFailedError
from moesaic.launch.http.serve import bind
from moesaic.launch.http.serve import serve as serve_http
from moesaic.launch.http.starting import answer_while_starting
from moesaic.launch.layout_rules import layout_conflicts
from moesaic.launch.memory_plan import memory_rows
from moesaic.launch.multi_node import GRACE_SECONDS, rank_specs, run_other_node, watched_nodes
from moesaic.launch.preflight.command import quick_look, refuse_unready
from moesaic.launch.rendezvous import NodeWatch
from moesaic.launch.report import report_rows
from moesaic.launch.startup import Plan, make_plan
from moesaic.launch.supervision import SUPERVISION_SECONDS, Supervisor
from moesaic.launch.version import version
from moesaic.launch.workers import WorkerGroup

# Reading hundreds of gigabytes over a network takes its time; what hangs is noticed by its own deadline before this.
READY_SECONDS = 3600.0
PORT_ERRORS = frozenset({errno.EADDRINUSE, errno.EACCES})


def serve(config: ServerConfig) -> int:
    """Run one node of the server until it ends. Returns 0 for a clean stop.

    Raises ConfigError for a start that is refused, RankFailedError for a rank or node that failed.
    """
    console = make_console()
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    refuse(layout_conflicts(config))
    plan = make_plan(config)
    with contextlib.closing(_bind(config)) as sock:
        show_plan(console, plan)
        for words in refuse_unready(quick_look(config, plan)):
            console.print(f"[yellow]warning[/] {escape(words)}", highlight=False)
        if config.nnodes > 1:
            console.print(f"meeting {config.nnodes} nodes at {config.dist_init_addr}", highlight=False)
        with _bootstrap_server(config), plan_endpoints(config) as endpoints, watched_nodes(plan) as watch:
            workers = WorkerGroup(rank_specs(plan, endpoints))
            if config.node_rank > 0:
                assert watch is not None
                return run_other_node(plan, watch, workers, sock)
            node = _HttpNode(plan=plan, endpoints=endpoints, workers=workers, watch=watch, sock=sock, console=console)
            return asyncio.run(node.run())


def _bind(config: ServerConfig) -> socket.socket:
    """The port is taken before anything starts, so that a taken one is known now and not after the weights are read."""
    try:
        return bind(config.host, config.port)
    except OSError as error:
        # A taken or forbidden port is one thing; an address that this machine does not have is another.
        wrong = "--port" if isinstance(error.__cause__, OSError) and error.__cause__.errno in PORT_ERRORS else "--host"
        raise ConfigError(f"--host {config.host} --port {config.port}: {error}; choose another {wrong}") from None


def _bootstrap_server(config: ServerConfig) -> contextlib.AbstractContextManager[object]:
    """Of a prefill instance, on node 0: where its ranks register and decode ranks ask for them."""
    if config.disaggregation_mode != "prefill" or config.node_rank > 0:
        return contextlib.nullcontext()
    host = config.host if config.nnodes == 1 else "0.0.0.0"
    try:
        return BootstrapServer(host, config.disaggregation_bootstrap_port)
    except OSError as error:
        port = config.disaggregation_bootstrap_port
        raise ConfigError(f"--disaggregation-bootstrap-port {port}: {error}; choose another one") from None


def http_config(plan: Plan, endpoints: Endpoints) -> HttpConfig:
    """What the HTTP side is told."""
    config, resolved, topology = plan.config, plan.resolution.config, plan.resolution.topology
    return HttpConfig(
        host=config.host,
        port=config.port,
        api_key=config.api_key,
        model_path=config.model_path,
        tokenizer_path=config.tokenizer_path,
        served_model_name=plan.served_model_name,
        context_length=resolved.context_length,
        vocab_size=plan.model.vocab_size,
        dp_size=topology.dp_size,
        attn_tp_size=topology.attn_tp_size,
        world_size=topology.world_size,
        to_rank_endpoints=endpoints.to_rank,
        from_rank_endpoint=endpoints.from_rank,
        load_balance_method=resolved.load_balance_method,
        max_queued_requests=resolved.max_queued_requests,
        max_running_requests=resolved.max_running_requests_per_dp,
        random_seed=config.random_seed,
        eos_token_ids=plan.eos_token_ids,
        default_sampling=plan.default_sampling,
        architectures=(plan.model.architecture,),
        model_type=plan.model.model_type,
        server_args={name: value for name, value in asdict(config).items() if name != "api_key"},
        resolution=tuple(report_rows(plan.resolution.choices)),
        memory_plan=memory_rows(plan.memory),
        version=version(),
        role=config.disaggregation_mode,
        bootstrap_port=config.disaggregation_bootstrap_port,
        log_level=config.log_level,
        log_level_http=config.log_level_http or ("debug" if config.log_level == "debug" else "warning"),
        log_requests_level=config.log_requests_level if config.log_requests else None,
        watchdog_timeout=resolved.watchdog_timeout,
    )


class _HttpNode:
    """Node 0: its ranks, the client that talks to all ranks, and the HTTP server, from start to end."""

    def __init__(
        self,
        *,
        plan: Plan,
        endpoints: Endpoints,
        workers: WorkerGroup,
        watch: NodeWatch | None,
        sock: socket.socket,
        console: Console,
    ) -> None:
        self._plan = plan
        self._endpoints = endpoints
        self._workers = workers
        self._watch = watch
        self._sock = sock
        self._console = console
        self._http_config = http_config(plan, endpoints)
        self._client = RankClient(self._http_config)
        self._supervisor = Supervisor(workers, watch)
        self._reported: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Returns 0 after a clean stop; RankFailedError names who ended it otherwise."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, stop)
        self._workers.start()
        self._spawn(self._supervise(stop))
        grace = 0.0
        try:
            if await self._start(stop):
                await serve_http(self._http_config, self._client, sock=self._sock, stop=stop, on_started=self._on_started)
            grace = GRACE_SECONDS
        except EngineFailedError as error:
            raise RankFailedError(self._blame(str(error))) from None
        finally:
            await self._end(grace)
        return 0

    async def _start(self, stop: asyncio.Event) -> bool:
        """Wait until all ranks are ready; False when told to stop before that."""
        with StartupView(self._console, self._http_config.world_size) as view:
            async with answer_while_starting(self._sock, view.doing):
                return await self._wait_ready(stop, view)

    async def _wait_ready(self, stop: asyncio.Event, view: StartupView) -> bool:
        ready = asyncio.create_task(self._client.wait_ready(READY_SECONDS, view.update))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((ready, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not ready.done():
            ready.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ready
            return False
        ready.result()
        return True

    def _on_signal(self, stop: asyncio.Event) -> None:
        if stop.is_set():
            self._workers.kill()
            self._endpoints.remove()
            os._exit(130)
        stop.set()
        with contextlib.suppress(OSError):  # nobody may be reading any more, as after `| head`
            print("\nstopping (Ctrl-C again kills)", flush=True)

    def _on_started(self) -> None:
        self._spawn(self._announce())

    async def _announce(self) -> None:
        if not self._plan.config.skip_server_warmup:
            try:
                await asyncio.to_thread(self._warm_up)
            except OSError as error:
                logging.getLogger(__name__).warning("the warm-up request failed: %s", error)
        if self._client.problem() is None:
            show_ready(self._console, self._plan)

    def _warm_up(self) -> None:
        """One token through the whole server, so that the first user does not pay for what is done once."""
        host, port = self._sock.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://[{host}]:{port}/health_generate" if ":" in host else f"http://{host}:{port}/health_generate"
        headers = {"Authorization": f"Bearer {self._plan.config.api_key}"} if self._plan.config.api_key else {}
        # No proxy: this is a request of the server to itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, headers=headers), timeout=60):
            pass

    async def _supervise(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            culprit = await asyncio.to_thread(self._supervisor.culprit)
            if culprit is not None and not stop.is_set():
                self._reported = culprit
                self._client.fail(culprit)
                return
            await asyncio.sleep(SUPERVISION_SECONDS)

    def _blame(self, reason: str) -> str:
        """The rank that failed first, with the reason that reached us first where that says something else."""
        culprit = reason if self._reported == reason else self._supervisor.await_certain_culprit()
        return reason if culprit in (None, reason) else f"{culprit}; then {reason}"

    async def _end(self, grace_seconds: float) -> None:
        if self._watch is not None and grace_seconds:
            self._watch.report_stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._client.shutdown_ranks()
        await self._client.close()
        self._workers.stop(grace_seconds)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        self._tasks.add(asyncio.create_task(coroutine))
