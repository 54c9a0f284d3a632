"""What a forward counts as: loads are kept, and balance is reported, for prefill and decode apart."""

from __future__ import annotations

from typing import Literal, get_args

ForwardMode = Literal["prefill", "decode"]
"""`prefill` if any rank computes prompt tokens in it, whatever else it does, else `decode`."""

FORWARD_MODES: tuple[ForwardMode, ...] = get_args(ForwardMode)
