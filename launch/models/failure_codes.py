"""What failed, as one number that every rank reads alike: which of the model's operations, and in which micro-batch.

Knows neither ranks nor how the number travels. The cause doesn't travel: it is in the log of the rank where it happened.
"""

from __future__ import annotations

from collections.abc import Iterable

from moesaic.overlap.operations import Operation, OperationError

_PLACES = 3
"""An operation can fail in a batch that isn't split, or in either micro-batch."""


class FailureCodes:
    """`operations`: all that a step may run; any order, but the same on every rank. Those with the same title count as one."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._operations = tuple({operation.title: operation for operation in operations}.values())
        self._number = {operation.title: number for number, operation in enumerate(self._operations)}

    def code(self, error: OperationError) -> int:
        """1 or more."""
        place = 0 if error.micro_batch is None else error.micro_batch + 1
        return 1 + _PLACES * self._number[error.operation.title] + place

    def error(self, code: int, rank: int) -> OperationError:
        """What happened on `rank`, from its code."""
        number, place = divmod(code - 1, _PLACES)
        cause = RuntimeError("the log of that rank says why")
        error = OperationError(self._operations[number], place - 1 if place else None, cause, fatal=False)
        error.rank = rank
        return error
