"""One log line when a request arrives and one when it ends (`--log-requests`), with as much of it as SGLang's level says.

0: name, DP rank, sizes and times; 1: its sampling parameters too; 2: the beginning of prompt and answer too; 3: all of them.
Knows no API's body: a request is a `Generated`, after its parameters were settled.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from moesaic.launch.http.run import Generated

logger = logging.getLogger(__name__)

Level = Literal[0, 1, 2, 3]
SHOWN = 2048
"""Most characters of a prompt or answer at level 2."""


class RequestLog:
    """`level` None: nothing is logged. /configure_logging changes it."""

    def __init__(self, level: Level | None) -> None:
        self.level = level

    def received(self, sequence: Generated) -> None:
        if self.level is None:
            return
        job = sequence.job
        parts = [f"Receive: rid={job.name!r} dp_rank={sequence.dp_rank} prompt_tokens={len(job.input_ids)}"]
        if self.level >= 1:
            parts.append(f"sampling_params={msgspec.structs.asdict(job.plan.params)} stop={list(job.plan.stops)}")
        if self.level >= 2:
            parts.append(f"input_ids={self._shortened(str(list(job.input_ids)))}")
        logger.info(" ".join(parts))

    def finished(self, sequence: Generated) -> None:
        """`sequence.finish` None: it was ended early, by a client that left or by a failure."""
        if self.level is None:
            return
        reason = "aborted" if sequence.finish is None else sequence.finish.kind
        parts = [
            f"Finish: rid={sequence.job.name!r} dp_rank={sequence.dp_rank} finish_reason={reason} "
            f"completion_tokens={len(sequence.output_ids)} cached_tokens={sequence.cached_tokens} "
            f"e2e_latency={sequence.latency():.3f}"
        ]
        if self.level >= 2:
            parts.append(f"text={self._shortened(sequence.text)!r}")
        logger.info(" ".join(parts))

    def _shortened(self, text: str) -> str:
        return text if self.level == 3 or len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
