"""Chat messages as bodies have them, to what a chat template reads and to token ids. Shared by chat and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.launch.http.chat_template import ChatTemplateError
from moesaic.launch.http.errors import bad_request
from moesaic.launch.http.services import Services

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def clean_message(message: object, param: str) -> dict[str, Any]:
    """One message with a role and its content as one string."""
    if not isinstance(message, dict):
        raise bad_request(f"{param} must be an object", param)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise bad_request(f"{param}.role must be a non-empty string", f"{param}.role")
    if message.get("tool_calls"):
        raise bad_request(f"{param}.tool_calls: tool calls are not supported yet", f"{param}.tool_calls")
    # OpenAI's newer name for the same thing; templates know only the older one.
    role = "system" if role == "developer" else role
    return {**message, "role": role, "content": _content_text(message.get("content"), f"{param}.content")}


def _content_text(content: object, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{param} must be a string or a list of text parts", param)
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise bad_request(f"{param}[{index}]: only text parts are supported, got type {kind!r}", f"{param}[{index}]")
        texts.append(part["text"])
    return "".join(texts)


async def encode_messages(
    services: Services,
    messages: Sequence[Mapping[str, Any]],
    param: str,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's token ids by the model's chat template."""
    tokenizer = services.need_tokenizer(param)
    if tokenizer.chat_template is None:
        raise bad_request(
            "this model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json): "
            "use /v1/completions or /generate",
            param,
            "no_chat_template",
        )
    if not messages:
        raise bad_request(f"{param} is empty: there must be at least one message", param)
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise bad_request("continue_final_message: the last message must be the assistant's", "continue_final_message")
    try:
        if continue_final_message:
            text = tokenizer.chat_template.render_to_continue(messages, extra)
        else:
            text = tokenizer.chat_template.render(messages, add_generation_prompt=add_generation_prompt, extra=extra)
    except ChatTemplateError as error:
        raise bad_request(str(error), param) from None
    # The template writes the beginning-of-sequence token itself.
    return await tokenizer.encode_async(text, add_special_tokens=False)
