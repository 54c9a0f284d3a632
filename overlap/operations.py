"""Operations: named callables on a state, separated by yield points into stages.

A list of operations says what a layer does and where other work may be put in between. The state carries values from one operation
to a later one; it refuses to overwrite a value and to end with values nobody took, so a forgotten hand-over fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


class State:
    """Values on their way between operations, each put once and taken once."""

    def __init__(self, **values: Any) -> None:
        self._values: dict[str, Any] = values

    def put(self, name: str, value: Any) -> None:
        """Hand a value on. Raises KeyError when one of this name has not been taken yet."""
        if name in self._values:
            raise KeyError(f"state already holds {name!r}: an operation would overwrite a value nobody took")
        self._values[name] = value

    def take(self, name: str) -> Any:
        """Remove and return a value. Raises KeyError naming what is there instead."""
        if name not in self._values:
            raise KeyError(f"state has no {name!r}; it holds {sorted(self._values)}")
        return self._values.pop(name)

    def peek(self, name: str) -> Any:
        """Look at a value that a later operation will take."""
        return self._values[name]

    def finish(self) -> None:
        """Raises RuntimeError if a value was left behind."""
        if self._values:
            raise RuntimeError(f"operations ended with values nobody took: {sorted(self._values)}")


@dataclass(frozen=True)
class Operation:
    """`name` appears in errors and timelines."""

    name: str
    run: Callable[[State], None]


@dataclass(frozen=True)
class YieldOperation:
    """Here another micro-batch may run."""


OperationList = Sequence[Operation | YieldOperation]


class OperationError(RuntimeError):
    """An operation raised; the cause is chained."""


def run_straight(operations: Iterator[Operation | YieldOperation] | OperationList, state: State) -> None:
    """Run one list from start to end. Raises OperationError that names the operation which failed."""
    for operation in operations:
        if isinstance(operation, YieldOperation):
            continue
        try:
            operation.run(state)
        except Exception as error:
            raise OperationError(f"operation {operation.name} failed: {error}") from error
