"""Endpoints of SGLang and vLLM that are not built here: each answers 400 and says so, with what to do instead.

A plain 404 would look like a wrong address. Knows no bodies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response

from moesaic.launch.http.errors import bad_request

_NO_EMBEDDINGS = "this model generates text: it gives no embeddings, classes or scores"
_WEIGHTS = "weights are read once, at the start: start another server with the other --model-path"
_LORA = "LoRA adapters are not built"
_SESSIONS = "sessions are not built: send the whole conversation, its beginning is in the prefix cache"
_PAUSE = "generation can't be paused: /abort_request ends requests"
_SETTINGS = "settings are fixed at the start: restart the server with other flags"
_ANSWERS = "nothing is stored: every /v1/responses answer is complete in itself"
_TEXT = "tool calls and reasoning are not taken apart: answers are plain text"
_OTHER_API = "this API is not built: use /v1/chat/completions, /v1/completions, /v1/responses or /generate"

# By path: why, and what instead.
REASONS: dict[str, str] = {
    **dict.fromkeys(("/encode", "/v1/embeddings", "/embeddings", "/classify", "/v1/classify", "/pooling"), _NO_EMBEDDINGS),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v1/score", "/score", "/v1/decisions"), _NO_EMBEDDINGS),
    **dict.fromkeys(("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc"), _WEIGHTS),
    **dict.fromkeys(("/update_weights_from_distributed", "/init_weights_update_group", "/destroy_weights_update_group"), _WEIGHTS),
    **dict.fromkeys(("/update_weight_version", "/get_weights_by_name", "/weights_checker"), _WEIGHTS),
    **dict.fromkeys(("/release_memory_occupation", "/resume_memory_occupation", "/sleep", "/wake_up"), _WEIGHTS),
    **dict.fromkeys(("/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _LORA),
    **dict.fromkeys(("/open_session", "/close_session"), _SESSIONS),
    **dict.fromkeys(("/pause_generation", "/continue_generation", "/slow_down"), _PAUSE),
    **dict.fromkeys(("/set_internal_state", "/pd_role_switch", "/set_trace_level", "/scale_elastic_ep"), _SETTINGS),
    **dict.fromkeys(("/v1/responses/{name}", "/v1/responses/{name}/cancel"), _ANSWERS),
    **dict.fromkeys(("/parse_function_call", "/separate_reasoning"), _TEXT),
    **dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens", "/v1/audio/transcriptions", "/invocations"), _OTHER_API),
    **dict.fromkeys(("/api/chat", "/api/generate", "/api/tags", "/api/show"), _OTHER_API),
}


def make_router() -> APIRouter:
    router = APIRouter()
    for path, reason in REASONS.items():
        router.add_api_route(path, _refuse(path, reason), methods=["GET", "POST", "PUT", "DELETE"])
    return router


def _refuse(path: str, reason: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise bad_request(f"{path}: {reason}", code="not_supported")

    return refuse
