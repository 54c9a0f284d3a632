"""/tokenize and /detokenize: text and conversations to token ids as a prompt would become them, and back. No rank is asked."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from moesaic.launch.http.body import read_body
from moesaic.launch.http.errors import bad_request, json_response
from moesaic.launch.http.job import check_ids
from moesaic.launch.http.messages_text import clean_message, encode_messages
from moesaic.launch.http.services import Services


class TokenizeBody(msgspec.Struct, kw_only=True):
    """SGLang's and vLLM's fields. `add_special_tokens` is for prompts: a conversation's template writes its own."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int | list[int]]
    skip_special_tokens: bool = True


def make_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    @router.post("/v1/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody)
        services.check_model(body.model)
        tokens = await _tokens(services, body)
        count = [len(ids) for ids in tokens] if isinstance(body.prompt, list) else len(tokens)
        return json_response({"tokens": tokens, "count": count, "max_model_len": services.limits.max_tokens})

    @router.post("/detokenize")
    @router.post("/v1/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody)
        services.check_model(body.model)
        return json_response({"text": _text(services, body)})

    return router


async def _tokens(services: Services, body: TokenizeBody) -> list[Any]:
    """Token ids of a prompt or a conversation; of several prompts a list of them."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("exactly one of prompt and messages must be given", "prompt")
    if body.messages is not None:
        messages = [clean_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
        return await encode_messages(
            services,
            messages,
            "messages",
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            extra=body.chat_template_kwargs,
        )
    tokenizer, prompt = services.need_tokenizer("prompt"), body.prompt
    assert prompt is not None
    if isinstance(prompt, str):
        return await tokenizer.encode_async(prompt, add_special_tokens=body.add_special_tokens)
    return [await tokenizer.encode_async(text, add_special_tokens=body.add_special_tokens) for text in prompt]


def _text(services: Services, body: DetokenizeBody) -> str | list[str]:
    tokenizer = services.need_tokenizer("tokens")
    lists = [item for item in body.tokens if isinstance(item, list)]
    if lists and len(lists) < len(body.tokens):
        raise bad_request("tokens must be a list of token ids or a list of such lists, not a mixture", "tokens")
    given = lists or [[item for item in body.tokens if isinstance(item, int)]]
    texts = [
        tokenizer.decode(check_ids(ids, services.limits, "tokens"), skip_special_tokens=body.skip_special_tokens) if ids else ""
        for ids in given
    ]
    return texts if lists else texts[0]
