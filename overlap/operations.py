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

    def replace(self, name: str, value: Any) -> None:
        """Put a value whether or not there is one: for what an operation that failed has put, or not."""
        self._values[name] = value

    def discard(self, *names: str) -> None:
        """Drop values that are there: for what an operation that failed has taken, or not."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        """Raises RuntimeError if a value was left behind."""
        if self._values:
            raise RuntimeError(f"operations ended with values nobody took: {sorted(self._values)}")


@dataclass(frozen=True)
class Operation:
    """`name` is what it does, the same in every layer; `layer` says where, for errors and timelines.

    blank: makes of the state what the operation would have made of it, with values that say nothing, however far the operation
    came. None when the operation can't be left out, because others (or other ranks) depend on more than its values.
    """

    name: str
    run: Callable[[State], None]
    layer: int | None = None
    blank: Callable[[State], None] | None = None

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
    """An operation raised; the cause is chained. micro_batch: None when the batch was not split. rank: None when nobody has said.

    fatal: the run ended there. Otherwise it went on with blank values and all other operations ran: its results say nothing, but
    other ranks have noticed nothing either.
    """

    def __init__(self, operation: Operation, micro_batch: int | None, cause: Exception, *, fatal: bool) -> None:
        super().__init__(operation, micro_batch, cause)
        self.operation = operation
        self.micro_batch = micro_batch
        self.fatal = fatal
        self.rank: int | None = None
        self.__cause__ = cause

    def __str__(self) -> str:
        where = "" if self.micro_batch is None else f" in micro-batch {self.micro_batch}"
        rank = "" if self.rank is None else f" on rank {self.rank}"
        return f"operation {self.operation.title} failed{where}{rank}: {self.__cause__}"


class Failures:
    """Failures of operations that were left out of a run. Empty when all is well."""

    def __init__(self) -> None:
        self.first: OperationError | None = None

    def add(self, error: OperationError) -> None:
        """Note a failure; the first one counts, later ones may be its consequences."""
        if self.first is None:
            self.first = error


class Recorder(Protocol):
    """Is told when the CPU enters an operation and when it comes back, in the thread that runs it. See timeline.py."""

    def enter(self, operation: Operation, micro_batch: int) -> None: ...

    def leave(self) -> None: ...


def run_stage(
    stage: Iterable[Operation],
    state: State,
    micro_batch: int | None,
    recorder: Recorder | None = None,
    failures: Failures | None = None,
) -> None:
    """Run operations in order. micro_batch: None when the batch was not split (recorded as 0).

    An operation that raises and has a `blank` is left out and noted in `failures`. Without `failures` or a blank: OperationError.
    """
    if recorder is not None:
        _run_recorded(stage, state, micro_batch, recorder, failures)
        return
    for operation in stage:
        try:
            operation.run(state)
        except Exception as error:
            _leave_out(operation, state, micro_batch, error, failures)


def _run_recorded(
    stage: Iterable[Operation], state: State, micro_batch: int | None, recorder: Recorder, failures: Failures | None
) -> None:
    for operation in stage:
        recorder.enter(operation, micro_batch or 0)
        try:
            operation.run(state)
        except Exception as error:
            _leave_out(operation, state, micro_batch, error, failures)
        finally:
            recorder.leave()


def _leave_out(operation: Operation, state: State, micro_batch: int | None, error: Exception, failures: Failures | None) -> None:
    if failures is None or operation.blank is None:
        raise OperationError(operation, micro_batch, error, fatal=True)
    try:
        operation.blank(state)
    except Exception:
        raise OperationError(operation, micro_batch, error, fatal=True) from error
    failures.add(OperationError(operation, micro_batch, error, fatal=False))
