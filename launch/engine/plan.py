"""What a rank's scheduler wants to run in one step, and what is remembered of it until its results are in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.launch.engine.sequence import Int64Array, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence; `completes`: it ends with the sequence's last token, so it gives a new one."""

    sequence: Sequence
    start: int
    length: int
    completes: bool

    @property
    def end(self) -> int:
        return self.start + self.length

    def prompt_rows(self) -> range:
        """Positions in this chunk whose logits are wanted for prompt logprobs: those that predict a wanted prompt token."""
        request = self.sequence.request
        if request.logprob_start_len < 0 or self.sequence.first_output_sent:
            return range(0)
        first = max(request.logprob_start_len - 1, 0, self.start)
        return range(first, min(self.end, self.sequence.num_prompt - 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """decode_slots int64: table slots that decode one token each; then chunks. Sampled rows come in this order."""

    decode_slots: Int64Array
    chunks: tuple[Chunk, ...]

    @property
    def num_decode(self) -> int:
        return len(self.decode_slots)

    @property
    def num_extend(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_sampled(self) -> int:
        return self.num_decode + sum(chunk.completes for chunk in self.chunks)

    @property
    def num_logits(self) -> int:
        return self.num_sampled + sum(len(chunk.prompt_rows()) for chunk in self.chunks)

    def sampled_slots(self) -> Int64Array:
        """Slots of the sampled rows, int64 [S]."""
        completed = [chunk.sequence.slot for chunk in self.chunks if chunk.completes]
        return np.concatenate([self.decode_slots, np.array(completed, dtype=np.int64)]) if completed else self.decode_slots


@dataclass(frozen=True, slots=True)
class Launch:
    """A plan that the model was given. Its sequences may end, and their slots change hands, before its results are in.

    slots, owners, positions int64 [S], of the sampled rows: the slot, `SequenceTable.owner` of that slot at launch, and the index
    in the whole sequence of the token that the row gives.
    """

    plan: Plan
    slots: Int64Array
    owners: Int64Array
    positions: Int64Array
