"""Operations: named callables on a state, separated by yield points into stages.

A list of operations says what a layer does and where other work may be put in between. The state carries values from one operation
to a later one; it refuses to overwrite a value and to end with values nobody took, so a forgotten hand-over fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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
    """`name` is what it does, the same in every layer; `layer` says where, for errors and timelines."""

    name: str
    run: Callable[[State], None]
    layer: int | None = None

    @property
    def title(self) -> str:
        """`gate of layer 3`."""
        return titled(self.name, self.layer)


def titled(name: str, layer: int | None) -> str:
    """How an operation is called in errors and timelines."""
    return name if layer is None else f"{name} of layer {layer}"


@dataclass(frozen=True)
class YieldOperation:
    """Here another micro-batch may run."""


OperationList = Sequence[Operation | YieldOperation]


class OperationError(RuntimeError):
    """An operation raised; the cause is chained. micro_batch: None when the batch was not split."""

    def __init__(self, operation: Operation, micro_batch: int | None, cause: Exception) -> None:
        where = "" if micro_batch is None else f" in micro-batch {micro_batch}"
        super().__init__(f"operation {operation.title} failed{where}: {cause}")
        self.operation = operation
        self.micro_batch = micro_batch


class Recorder(Protocol):
    """Is told when the CPU enters an operation and when it comes back, in the thread that runs it. See timeline.py."""

    def enter(self, operation: Operation, micro_batch: int) -> None: ...

    def leave(self) -> None: ...


def run_stage(stage: Iterable[Operation], state: State, micro_batch: int | None, recorder: Recorder | None) -> None:
    """Run operations in order. micro_batch: None when the batch was not split (recorded as 0). Raises OperationError."""
    if recorder is not None:
        _run_recorded(stage, state, micro_batch, recorder)
        return
    for operation in stage:
        try:
            operation.run(state)
        except Exception as error:
            raise OperationError(operation, micro_batch, error) from error


def _run_recorded(stage: Iterable[Operation], state: State, micro_batch: int | None, recorder: Recorder) -> None:
    for operation in stage:
        recorder.enter(operation, micro_batch or 0)
        try:
            operation.run(state)
        except Exception as error:
            raise OperationError(operation, micro_batch, error) from error
        finally:
            recorder.leave()
