"""What rides along with a room's last pages: the first token, its log probabilities, and room for a hidden state.

Knows no transport: it travels as the `metadata` of `protocol.Last`, in the message itself, so there are no slots to collide in.
"""

from __future__ import annotations

import msgspec

from moesaic.launch.engine.messages import TokenLogprobs


class Handover(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`token_id` is the token sampled from the prompt. `cached_tokens`: the prompt's prefix hit on prefill.

    `computed_at`: when the last chunk was there, in seconds since 1970 by the prefill machine's clock (0: not said).
    `hidden_state`: the last prompt row's, raw bytes in `hidden_dtype`, for drafting (empty: none is sent).
    """

    token_id: int
    cached_tokens: int = 0
    computed_at: float = 0.0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    hidden_state: bytes = b""
    hidden_dtype: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Handover] = msgspec.msgpack.Decoder(Handover)


def encode_handover(handover: Handover) -> bytes:
    return _encoder.encode(handover)


def decode_handover(metadata: bytes) -> Handover:
    """Raises ValueError for what is not a handover."""
    return _decoder.decode(metadata)
