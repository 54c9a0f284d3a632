"""Splitting a batch in two micro-batches: at which row, and what each field of the batch becomes.

The first micro-batch has rows [0, cut) in their order, the second rows [cut, T). Where to cut is a function of counts alone. What a
field becomes follows from the axis that the field declares in its own dataclass, `field(metadata={"axis": ...})`:

    "rows"     one entry per row (a tensor, array or tuple): entries before the cut, entries after it
    "row_ids"  int64 tensor of row numbers: each half has its own in their order, counted from its first row
    "shared"   the same in both halves
    "given"    whoever splits hands both values over, by the field's name
    "batch"    a dataclass that declares its own axes
    function   (value, cut) -> (first, second), for values derived from several rows

The metadata is plain data, so a library that may not import this one can declare axes too. A field that declares none is an error
when `splittable` sees the class, that is at import. Knows no model and no ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, fields, is_dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WORDS = ("rows", "row_ids", "shared", "given", "batch")

BatchT = TypeVar("BatchT", bound="DataclassInstance")
ClassT = TypeVar("ClassT", bound=type[Any])
Derive = Callable[[Any, int], tuple[Any, Any]]


def split_row(num_decode: int, chunk_lengths: Sequence[int], threshold: float) -> int | None:
    """Rows of the first micro-batch of a batch: `num_decode` rows of a sequence each, then chunks of one sequence each.

    The boundary between two sequences that balances the rows best (the earlier of two equal ones), so decode is cut at half its
    sequences. When the smaller side would have less than `threshold` of the rows (0 to 0.5), half the rows, inside a sequence:
    the second micro-batch then attends to KV that the first one writes, so in every layer the first must have written its KV
    before the second attends. Threshold 0: never inside a sequence. None: the batch can't be split (it has fewer than two rows, or
    is a single sequence with threshold 0).
    """
    num_rows = num_decode + sum(chunk_lengths)
    half = num_rows // 2
    boundaries = [end for end in accumulate(chunk_lengths, initial=num_decode) if 0 < end < num_rows]
    if 0 < half < num_decode:
        boundaries.append(half)
    best = min(boundaries, key=lambda row: (abs(2 * row - num_rows), row), default=0)
    if min(best, num_rows - best) < threshold * num_rows:
        best = half
    return best or None


def splittable(cls: ClassT) -> ClassT:
    """Class decorator, above @dataclass. Raises TypeError if a field of it, or of a batch inside it, declares no known axis."""
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass, so its fields can't declare axes")
    hints = get_type_hints(cls)
    for field in fields(cls):
        if _axis(cls, field) == "batch":
            splittable(hints[field.name])
    return cls


def split_batch(batch: BatchT, cut: int, **given: tuple[Any, Any]) -> tuple[BatchT, BatchT]:
    """Rows before `cut` and rows from it on, as two batches; either may be empty. `given`: both values of each "given" field.

    Raises ValueError when the cut lies outside the rows or the fields disagree on their number, TypeError when `given` doesn't fit.
    """
    lengths = _row_counts(batch)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"fields of {type(batch).__name__} disagree on the number of rows: {lengths}")
    num_rows = next(iter(lengths.values()), 0)
    if not 0 <= cut <= num_rows:
        raise ValueError(f"cut {cut} of {type(batch).__name__} lies outside its {num_rows} rows")
    wanted = {field.name for field in fields(batch) if _axis(type(batch), field) == "given"}
    if given.keys() != wanted:
        raise TypeError(f"{type(batch).__name__} is split with both values of {sorted(wanted)}, got {sorted(given)}")
    halves = {field.name: _halves(batch, field, cut) for field in fields(batch) if field.name not in given} | given
    first, second = ({name: values[side] for name, values in halves.items()} for side in (0, 1))
    return type(batch)(**first), type(batch)(**second)


def _axis(cls: type[Any], field: Field[Any]) -> str | Derive:
    """The axis that a field declares. Raises TypeError where it declares none or an unknown one."""
    axis: str | Derive | None = field.metadata.get("axis")
    if axis is None:
        raise TypeError(
            f"{cls.__name__}.{field.name} declares no axis, so the batch can't be split: declare field(metadata={{'axis': ...}}) "
            f"with one of {', '.join(WORDS)} or a function (value, cut) -> (first, second)"
        )
    if not callable(axis) and axis not in WORDS:
        raise TypeError(f"{cls.__name__}.{field.name} declares the axis {axis!r}; choose one of {', '.join(WORDS)} or a function")
    return axis


def _halves(batch: DataclassInstance, field: Field[Any], cut: int) -> tuple[Any, Any]:
    value = getattr(batch, field.name)
    axis = _axis(type(batch), field)
    if callable(axis):
        return axis(value, cut)
    if axis == "rows":
        return value[:cut], value[cut:]
    if axis == "row_ids":
        in_first = value < cut
        return value[in_first], value[~in_first] - cut
    if axis == "batch":
        return split_batch(value, cut)
    assert axis == "shared", "given fields are handed over"
    return value, value


def _row_counts(batch: DataclassInstance) -> dict[str, int]:
    """Entries of each field along "rows", those of inner batches included, by dotted name."""
    counts: dict[str, int] = {}
    for field in fields(batch):
        axis = _axis(type(batch), field)
        if axis == "rows":
            counts[field.name] = len(getattr(batch, field.name))
        elif axis == "batch":
            inner = _row_counts(getattr(batch, field.name))
            counts |= {f"{field.name}.{name}": count for name, count in inner.items()}
    return counts
