"""Every so many steps of a DP rank one log line that says what it does, in the words of SGLang's, which people and scripts know.

Knows no scheduler: it is told of each step's plan and of the load after it.
"""

from __future__ import annotations

import logging

from moesaic.launch.engine.messages import LoadReport
from moesaic.launch.engine.plan import Plan

logger = logging.getLogger(__name__)


class StepLog:
    """Counts since the last line. `interval`: steps with work between two lines."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._num_steps = 0
        self._num_new_tokens = 0
        self._num_new_seqs = 0

    def step(self, plan: Plan, load: LoadReport) -> None:
        """After a step of this DP rank. A prompt counts when its last chunk has run."""
        if not (plan.num_decode or plan.chunks):
            return
        self._num_steps += 1
        self._num_new_tokens += plan.num_extend
        self._num_new_seqs += sum(chunk.completes for chunk in plan.chunks)
        if self._num_steps >= self._interval:
            self._tell("Decode" if plan.num_decode else "Prefill", load)
            self._num_steps = self._num_new_tokens = self._num_new_seqs = 0

    def _tell(self, kind: str, load: LoadReport) -> None:
        usage = load.num_used_tokens / load.max_total_num_tokens if load.max_total_num_tokens else 0.0
        logger.info(
            "%s batch. dp_rank: %d, #running-req: %d, #token: %d, token usage: %.2f, gen throughput (token/s): %.2f, "
            "#queue-req: %d, #new-seq: %d, #new-token: %d, cache hit rate: %.2f, #retracted-req: %d",
            *(kind, load.dp_rank, load.num_running_reqs, load.num_used_tokens, usage, load.gen_throughput, load.num_waiting_reqs),
            *(self._num_new_seqs, self._num_new_tokens, load.cache_hit_rate, load.num_retracted_reqs),
        )
