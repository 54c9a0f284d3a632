"""Log probabilities in the two forms of the OpenAI APIs: a list of objects (chat), parallel lists (completions)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.launch.engine.messages import TokenLogprobs
from moesaic.launch.http.tokenizer import Tokenizer

# JSON has no minus infinity; OpenAI uses this for tokens that cannot be.
FLOOR = -9999.0


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, FLOOR)


def chat_logprobs(tokenizer: Tokenizer, rows: Sequence[TokenLogprobs]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    content = [{**entry(row.token_id, row.logprob), "top_logprobs": [entry(*top) for top in row.top]} for row in rows]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, rows: Sequence[TokenLogprobs], with_top: bool, offset: int) -> dict[str, Any]:
    """`offset`: where the first of these tokens stands in the answer's text."""
    tokens = [tokenizer.token_text(row.token_id) for row in rows]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = [
        {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in row.top} if row.top else None for row in rows
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(row.logprob) for row in rows],
        "top_logprobs": tops if with_top else None,
        "text_offset": offsets,
    }
