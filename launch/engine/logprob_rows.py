"""Log probabilities of a step's rows: which are wanted (known at launch), as tensors (beside the logits), as messages (later).

Three stations because they belong to different threads: the one that schedules wants them and words the messages, the one that
runs the model computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moesaic.launch.engine.messages import TokenLogprobs
from moesaic.launch.engine.plan import Chunk, Plan
from moesaic.launch.engine.sampler import token_logprobs
from moesaic.launch.engine.sequence import Int64Array, SequenceTable


@dataclass(frozen=True, kw_only=True)
class RowLogprobs:
    """Of N rows: tokens int64 [N], their logprob [N], values and ids of the K largest [N, K]; how many of those each row wants."""

    tokens: Tensor
    logprob: Tensor
    values: Tensor
    ids: Tensor
    tops: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.logprob, self.values, self.ids

    def of(self, tensors: Iterator[Tensor]) -> RowLogprobs:
        """The same with the next of these tensors: on the host."""
        tokens, logprob, values, ids = (next(tensors) for _ in self.tensors)
        return replace(self, tokens=tokens, logprob=logprob, values=values, ids=ids)

    def messages(self) -> list[TokenLogprobs]:
        """One for each row."""
        rows = zip(self.tokens.tolist(), self.logprob.tolist(), self.values.tolist(), self.ids.tolist(), self.tops, strict=True)
        return [
            TokenLogprobs(token_id=token, logprob=own, top=[(ids[i], values[i]) for i in range(count)])
            for token, own, values, ids, count in rows
        ]


@dataclass(frozen=True, kw_only=True)
class SampledLogprobs:
    """Of the sampled rows `rows`, the logprobs of what they gave. `tops`: how many top ones each of them wants.

    index int64 [N]: the rows, where the logits are.
    """

    rows: tuple[int, ...]
    index: Tensor
    tops: tuple[int, ...]

    def compute(self, logits: Tensor, tokens: Tensor) -> RowLogprobs:
        """logits [S, V] and tokens int64 [S] of all sampled rows."""
        return _compute(logits.index_select(0, self.index), tokens.index_select(0, self.index), self.tops)


@dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """Of a chunk's prompt: `first_row` among the step's logits, and the tokens int64 [N] that its N rows from there predict."""

    chunk: Chunk
    first_row: int
    tokens: Tensor
    tops: tuple[int, ...]

    def compute(self, logits: Tensor) -> RowLogprobs:
        """logits [*, V] of all rows of the step."""
        return _compute(logits[self.first_row : self.first_row + len(self.tokens)], self.tokens, self.tops)


def wanted_of_sampled(slots: Int64Array, table: SequenceTable) -> SampledLogprobs | None:
    """The rows of `slots` int64 [S] whose requests ask for logprobs; None: no row's."""
    rows = np.flatnonzero(table.wants_logprobs[slots])
    if not len(rows):
        return None
    tops = tuple(table.sequence(int(slots[row])).request.top_logprobs_num for row in rows.tolist())
    return SampledLogprobs(rows=tuple(rows.tolist()), index=torch.from_numpy(rows), tops=tops)


def wanted_of_prompts(plan: Plan) -> tuple[PromptLogprobs, ...]:
    """Those of every chunk that has any, in the order of the plan; on the CPU."""
    wanted = []
    row = plan.num_sampled
    for chunk in plan.chunks:
        positions = chunk.prompt_rows()
        if len(positions):
            tokens = torch.from_numpy(chunk.sequence.tokens[positions.start + 1 : positions.stop + 1].astype(np.int64))
            tops = (chunk.sequence.request.top_logprobs_num,) * len(positions)
            wanted.append(PromptLogprobs(chunk=chunk, first_row=row, tokens=tokens, tops=tops))
        row += len(positions)
    return tuple(wanted)


def _compute(logits: Tensor, tokens: Tensor, tops: tuple[int, ...]) -> RowLogprobs:
    logprob, values, ids = token_logprobs(logits, tokens, max(tops))
    return RowLogprobs(tokens=tokens, logprob=logprob, values=values, ids=ids, tops=tops)
