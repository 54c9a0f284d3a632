"""What the engine of an instance with a role has besides: requests that come from, or go to, another instance.

An interface only; prefill and decode implement it in `launch/disaggregation/`. Every rank of a DP group keeps the same rooms in the
same order. What it sees of them differs from rank to rank, so each rank tells its group in a word of the step header (`word`), and
all move on by the words of all (`settle`). Without a role there is none of this.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

from moesaic.launch.engine.messages import GenerateRequest, RoomLoad, TokenLogprobs
from moesaic.launch.engine.plan import Chunk
from moesaic.launch.engine.sequence import Sequence


class Rooms(Protocol):
    """All calls come from the engine's thread, and none waits."""

    @property
    def num_open(self) -> int:
        """Rooms that have not ended: while there are any, the engine goes on stepping."""
        ...

    def num_unplaced(self) -> tuple[int, int]:
        """Requests that the scheduler does not know yet, and their prompt tokens."""
        ...

    def load(self) -> RoomLoad: ...

    def take(self, request: GenerateRequest) -> None:
        """A request has come. Raises ValueError for one that can never run."""
        ...

    def abort(self, rid: int) -> bool:
        """Nobody wants the request any more. False: no room of it is open, so it is the scheduler's, if anybody's."""
        ...

    def word(self) -> int:
        """What this rank sees of its rooms, for the step header; once per step."""
        ...

    def settle(self, words: Many[int], *, forward_runs: bool) -> None:
        """The words of all ranks of the DP group, in rank order, in the step of `word`.

        `forward_runs`: a step is under way, and may still write to pages freed since its launch; it has ended by the next call.
        """
        ...

    def chunk_settled(self, chunk: Chunk) -> None:
        """The chunk's KV is there."""
        ...

    def hand_over(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> bool:
        """A token that needs an output of its own. True: it is not for the client, and the sequence is kept."""
        ...

    def dropped(self, rid: int, message: str) -> None:
        """The step that ran the request failed; the scheduler has forgotten it, and the client is told."""
        ...
