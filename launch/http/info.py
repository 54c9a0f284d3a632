"""What the server says of itself: model, settings, loads. Read only; shapes are those that routers and benchmarks read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter, Response

from moesaic.launch.engine.messages import LoadReport
from moesaic.launch.http.errors import ApiError, json_response
from moesaic.launch.http.metrics import token_usage
from moesaic.launch.http.services import Services

GIB = 1 << 30


def make_router(services: Services) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    @router.get("/model_info")
    @router.get("/get_model_info")
    async def model_info() -> Response:
        return json_response(_model_info(services))

    @router.get("/server_info")
    @router.get("/get_server_info")
    async def server_info() -> Response:
        return json_response(_server_info(services))

    @router.get("/get_load")
    async def get_load() -> Response:
        return json_response([_short_load(load) for load in services.client.loads()])

    @router.get("/v1/loads")
    async def loads() -> Response:
        rows = [_load(load) for load in services.client.loads()]
        now = datetime.now(UTC).isoformat()
        return json_response({"timestamp": now, "version": services.config.version, "loads": rows})

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(services, created)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != services.config.served_model_name:
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return json_response(_model(services, created))

    return router


def _model(services: Services, created: int) -> dict[str, Any]:
    name = services.config.served_model_name
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "moesaic",
        "root": services.config.model_path,
        "parent": None,
        "max_model_len": services.limits.max_tokens,
    }


def _model_info(services: Services) -> dict[str, Any]:
    config = services.config
    return {
        "model_path": config.model_path,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "served_model_name": config.served_model_name,
        "is_generation": True,
        "preferred_sampling_params": dict(config.default_sampling) or None,
        "weight_version": "default",
        "model_type": config.model_type,
        "architectures": list(config.architectures),
        "vocab_size": config.vocab_size,
        "max_context_length": config.context_length,
        "has_image_understanding": False,
        "has_audio_understanding": False,
    }


def _server_info(services: Services) -> dict[str, Any]:
    config, client = services.config, services.client
    # The settings first: what follows has fixed types that clients rely on.
    return {
        **{key: value for key, value in config.server_args.items() if key != "api_key"},
        "model_path": config.model_path,
        "served_model_name": config.served_model_name,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "dp_size": config.dp_size,
        "tp_size": config.world_size,
        "attn_tp_size": config.attn_tp_size,
        "load_balance_method": config.load_balance_method,
        "max_running_requests": config.max_running_requests,
        "max_queued_requests": config.max_queued_requests,
        "max_total_num_tokens": sum(load.max_total_num_tokens for load in client.loads()),
        "context_length": config.context_length,
        "resolution": _resolution(services),
        "memory_plan": dict(config.memory_plan),
        "status": "failing" if client.problem() else "ready",
        "version": config.version,
        "internal_states": [_internal_state(services)],
    }


def _resolution(services: Services) -> list[Mapping[str, object]]:
    """The report as the launcher made it, and with two-batch overlap what the ranks have measured since."""
    ready = services.client.ready.get(0)
    profile = None if ready is None else ready.overlap_profile
    if profile is None:
        return list(services.config.resolution)
    calibration = {**asdict(profile), "split_from_tokens_per_dp_rank": profile.thresholds()}
    return [
        {**row, "calibration": calibration} if row.get("capability") == "two-batch overlap" else row
        for row in services.config.resolution
    ]


def _internal_state(services: Services) -> dict[str, Any]:
    rebalance = services.client.health.rebalance()
    loads, ready = services.client.loads(), services.client.ready.values()
    return {
        "last_gen_throughput": sum(load.gen_throughput for load in loads),
        "effective_max_running_requests_per_dp": services.config.max_running_requests,
        "memory_usage": {
            "weight": round(sum(rank.weight_bytes for rank in ready) / GIB, 3),
            "kvcache": round(sum(rank.kv_bytes_per_token * rank.max_total_num_tokens for rank in ready) / GIB, 3),
            "token_capacity": sum(load.max_total_num_tokens for load in loads),
            "graph": 0.0,
        },
        "num_retracted_reqs": sum(load.num_retracted_reqs for load in loads),
        "retraction": [None if load.retraction is None else msgspec.structs.asdict(load.retraction) for load in loads],
        "rebalance": None if rebalance is None else asdict(rebalance),
        "load_seconds": {f"rank {rank.rank}": dict(rank.phase_seconds) for rank in ready},
    }


def _short_load(load: LoadReport) -> dict[str, int]:
    return {
        "dp_rank": load.dp_rank,
        "num_reqs": load.num_running_reqs + load.num_waiting_reqs,
        "num_waiting_reqs": load.num_waiting_reqs,
        "num_tokens": load.num_used_tokens + load.num_waiting_tokens,
    }


def _load(load: LoadReport) -> dict[str, float]:
    return {
        "dp_rank": load.dp_rank,
        "num_running_reqs": load.num_running_reqs,
        "num_waiting_reqs": load.num_waiting_reqs,
        "num_total_reqs": load.num_running_reqs + load.num_waiting_reqs,
        "num_used_tokens": load.num_used_tokens,
        "num_total_tokens": load.num_used_tokens + load.num_waiting_tokens,
        "max_total_num_tokens": load.max_total_num_tokens,
        "token_usage": round(token_usage(load), 6),
        "gen_throughput": round(load.gen_throughput, 3),
        "cache_hit_rate": round(load.cache_hit_rate, 6),
    }
