"""Health, metrics and commands: what operators, probes and routers ask besides generation."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from moesaic.launch.engine.messages import WARMUP, ProfileOptions
from moesaic.launch.http.body import parse_body
from moesaic.launch.http.control import Command
from moesaic.launch.http.errors import EngineFailedError, bad_request, json_response, unavailable
from moesaic.launch.http.job import FieldNames, make_jobs
from moesaic.launch.http.request_log import Level
from moesaic.launch.http.run import Run
from moesaic.launch.http.sampling import make_plan
from moesaic.launch.http.services import Services

BOTH = ["GET", "POST"]


class AbortBody(msgspec.Struct, kw_only=True):
    rid: str | None = None
    abort_all: bool | None = None


class LoggingBody(msgspec.Struct, kw_only=True):
    log_requests: bool | None = None
    log_requests_level: Level | None = None


def make_router(services: Services) -> APIRouter:
    router = APIRouter()
    _add_probes(router, services)
    _add_commands(router, services)
    return router


def _add_probes(router: APIRouter, services: Services) -> None:
    @router.get("/")
    async def root() -> Response:
        return json_response({"status": "moesaic is running", "model": services.config.served_model_name})

    @router.get("/health")
    @router.get("/ready")
    async def health() -> Response:
        problem = services.client.problem()
        if problem is not None:
            raise unavailable(problem)
        rebalance = services.client.health.rebalance()
        if rebalance is not None and rebalance.degraded:
            # Requests are served all the same: 200, so that no router takes the server out.
            return json_response({"status": "degraded", "rebalance": rebalance.last_cause or "a planner or a message is stuck"})
        return json_response({"status": "ok"})

    @router.get("/health_generate")
    async def health_generate() -> Response:
        await _generate_one_token(services)
        return json_response({"status": "ok"})

    @router.get("/metrics")
    @router.get("/metrics/", include_in_schema=False)
    async def metrics() -> Response:
        return Response(services.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _generate_one_token(services: Services) -> None:
    """One token through the engine. A busy engine that answers others in the meantime is well too."""
    limits = services.limits
    token_id = min(limits.eos_token_ids, default=0)
    num_tokens = 2 if services.config.role == "decode" else 1  # the first token comes from prefill
    plan = make_plan({"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}, limits)
    jobs = make_jobs("health_generate", [token_id], plan, limits, FieldNames(prompt="prompt", max_tokens="max_tokens"))
    if services.config.role != "null":
        jobs = [replace(job, bootstrap=WARMUP) for job in jobs]
    deadline, started = services.config.health_generate_deadline, time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            with Run(services, jobs, limited=False) as run:
                await run.finished()
    except TimeoutError:
        if services.client.last_output_at < started:
            raise unavailable(f"the engine has produced no token for {deadline:.0f} s") from None


def _add_commands(router: APIRouter, services: Services) -> None:
    @router.api_route("/flush_cache", methods=BOTH)
    async def flush_cache() -> Response:
        return await run_command(services, "flush_cache", "the prefix cache is empty")

    @router.api_route("/start_expert_distribution_record", methods=BOTH)
    async def start_record() -> Response:
        return await run_command(services, "start_record", "recording the expert distribution")

    @router.api_route("/stop_expert_distribution_record", methods=BOTH)
    async def stop_record() -> Response:
        return await run_command(services, "stop_record", "stopped recording the expert distribution")

    @router.api_route("/dump_expert_distribution_record", methods=BOTH)
    async def dump_record() -> Response:
        return await run_command(services, "dump_record", "dumped the expert distribution")

    @router.post("/rebalance_experts")
    async def rebalance_experts() -> Response:
        return await run_command(services, "rebalance", "a rebalance of the experts has begun")

    @router.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        body = parse_body(await request.body() or b"{}", AbortBody)
        if body.rid is None and not body.abort_all:
            raise bad_request("rid or abort_all must be given", "rid")
        return json_response({"aborted": services.client.abort_named(None if body.abort_all else body.rid)})

    @router.api_route("/configure_logging", methods=BOTH)
    async def configure_logging(request: Request) -> Response:
        body = parse_body(await request.body() or b"{}", LoggingBody)
        level = services.log.level if body.log_requests_level is None else body.log_requests_level
        if body.log_requests is not None:
            level = (2 if level is None else level) if body.log_requests else None
        services.log.level = level
        return json_response({"log_requests": level is not None, "log_requests_level": level})


async def run_command(
    services: Services, command: Command, done: str, *, profile: ProfileOptions | None = None, timeout: float = 30.0
) -> Response:
    """Run it on all DP ranks; their messages and files (such as the path of a dump) in the answer. 400 when one of them refuses.

    `profile`: of start_profile. `timeout` in seconds; 503 naming the silent ranks when it is over.
    """
    try:
        replies = await services.client.control(command, timeout, profile=profile)
    except EngineFailedError as error:
        raise unavailable(str(error)) from None
    refusals = [f"DP rank {reply.dp_rank}: {reply.message or 'refused'}" for reply in replies if not reply.ok]
    if refusals:
        raise bad_request("; ".join(refusals))
    answer: dict[str, object] = {"success": True, "message": done, "ranks": [reply.message for reply in replies]}
    files = [file for reply in replies for file in reply.files]
    return json_response({**answer, "files": files} if files else answer)
