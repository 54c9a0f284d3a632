"""Fields of SGLang's, vLLM's and OpenAI's bodies that are not built here: a request that asks for one of them is refused by name.

Bodies tolerate unknown fields, since routers and clients add their own; but what would change the answer must not be lost in
silence. A null, a false, or an empty value asks for nothing. Knows no endpoint.
"""

from __future__ import annotations

import msgspec

from moesaic.launch.http.errors import bad_request

_CONSTRAINED = "constrained decoding is not supported yet"
_ONE_MODEL = "the model is served as it is, without adapters or processors of a request"
_CACHE = (
    "the prefix cache has no compartments: leave it out, and start the server with --disable-radix-cache if prompts must not share"
)
_TEXT_ONLY = "text is all that goes in and out"
_NOT_RETURNED = "is not supported: no such values are returned"

# By name of a field: why it is refused.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), _CONSTRAINED),
    **dict.fromkeys(("stop_regex", "allowed_token_ids", "bad_words", "grammar"), _CONSTRAINED),
    **dict.fromkeys(("lora_path", "lora_id", "custom_logit_processor", "logits_processors", "custom_params"), _ONE_MODEL),
    **dict.fromkeys(("extra_key", "cache_salt"), _CACHE),
    **dict.fromkeys(("image_data", "video_data", "audio_data", "audio", "mm_processor_kwargs", "multi_modal_data"), _TEXT_ONLY),
    **dict.fromkeys(("input_embeds", "prompt_embeds"), "prompts are text or token ids"),
    **dict.fromkeys(
        ("session_params", "session_id"), "sessions are not supported: send the whole conversation, its beginning is cached"
    ),
    **dict.fromkeys(("return_hidden_states", "return_routed_experts", "return_indexer_topk"), _NOT_RETURNED),
    **dict.fromkeys(("return_sampling_mask", "return_entropy", "return_bytes"), _NOT_RETURNED),
    **dict.fromkeys(("return_token_ids", "return_prompt_token_ids"), "is not supported: /generate answers with token ids"),
    **dict.fromkeys(
        ("token_ids_logprob", "prompt_logprobs"), "is not supported: /generate has return_logprob and logprob_start_len"
    ),
    "top_logprobs": "is not a field of this API",
    "watermark": "is not supported",
    "use_beam_search": "beam search is not supported: n gives several answers",
    "length_penalty": "beam search is not supported: n gives several answers",
    "truncate_prompt_tokens": "prompts are never cut: send a shorter one",
    "max_thinking_tokens": "is not supported: max_tokens limits the whole answer",
    "include_stop_str_in_output": "is not supported: no_stop_trim keeps the stop string",
    "web_search_options": "tool calls are not supported yet",
    "prediction": "speculative decoding is not built",
}
_NOTHING = frozenset({b"null", b"false", b"[]", b"{}", b'""', b"0"})


def refuse_foreign(data: bytes, declared: frozenset[str]) -> None:
    """`data` is a JSON object. 400 for the first field of `REFUSED` that asks for something and is not among `declared`."""
    given = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    for name in given.keys() & (REFUSED.keys() - declared):
        if bytes(given[name]) not in _NOTHING:
            reason = REFUSED[name]
            raise bad_request(f"{name} {reason}" if reason.startswith("is ") else f"{name}: {reason}", name)
