"""Which flags of overlap go together: conflicts among the flags alone, whatever the model.

Two-batch and single-batch overlap do go together: the one is for steps that are split, the other for those that run straight, and
the calibration compares just these two. Backend `none` is allowed too (SGLang wants an all-to-all): its all-gather and all-reduce
travel beside computation as well, and a step is only split where that was measured to be faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import Conflict

_TWO_BATCH, _SINGLE_BATCH = "--enable-two-batch-overlap", "--enable-single-batch-overlap"


def overlap_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    """Overlap with nothing to overlap, and settings of an overlap that is off."""
    if config.tp_size == 1:
        for flag in _overlaps(config):
            yield Conflict(
                flags=f"{flag} with --tp-size 1",
                reason="a single rank sends nothing, so there is nothing to compute meanwhile",
                remedy=f"leave {flag} out, or use --tp-size 2 or more",
            )
    if not config.enable_two_batch_overlap:
        for flag in _two_batch_settings(config):
            yield Conflict(
                flags=f"{flag} without {_TWO_BATCH}",
                reason="it is a setting of two-batch overlap and would have no effect",
                remedy=f"add {_TWO_BATCH}, or leave it out",
            )


def sparse_layer_conflicts(config: ServerConfig, num_sparse_layers: int) -> Iterator[Conflict]:
    """Overlap for a model that has no routed experts: what is overlapped is their dispatch and combine."""
    if num_sparse_layers:
        return
    for flag in _overlaps(config):
        yield Conflict(
            flags=flag,
            reason="what is overlapped is the dispatch to routed experts and the combine, and the model has no sparse layers",
            remedy="leave it out",
        )


def _overlaps(config: ServerConfig) -> Iterator[str]:
    if config.enable_two_batch_overlap:
        yield _TWO_BATCH
    if config.enable_single_batch_overlap:
        yield _SINGLE_BATCH


def _two_batch_settings(config: ServerConfig) -> Iterator[str]:
    """Settings that were given. One that spells out its default asks for nothing, as in scripts written for SGLang."""
    defaults = {field.name: field.default for field in fields(ServerConfig)}
    for name in ("tbo_token_distribution_threshold", "tbo_profile"):
        value = getattr(config, name)
        if value != defaults[name]:
            yield f"--{name.replace('_', '-')} {value}"
