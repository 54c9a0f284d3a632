"""From how many tokens on splitting a step in two micro-batches wins: measured per forward mode, kept in a file.

Pure functions on timings; whoever measures runs the same steps straight and split, in turn, so that a drift of the machine's speed
hits both. Tokens are those of one data-parallel rank while all ranks have as many. The file (`--tbo-profile`) holds the timings
with the hardware, the date and the layout they were measured on; the threshold is derived from them, so it can't contradict them:

    {"format": "moesaic-tbo-profile", "version": 1, "hardware": "2 x Xeon 8481C", "date": "2026-10-01", "layout": {"ep_size": 2},
     "modes": {"decode": [{"num_tokens": 64, "straight_s": 0.021, "split_s": 0.018}, ...], "prefill": [...]}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

FORMAT, VERSION = "moesaic-tbo-profile", 1

MIN_GAIN = 0.02
"""Splitting wins where it saves at least this share of the straight step: less could be noise. A regret stays under 3% with it."""

Layout = Mapping[str, int | str]
"""What the timings hold for, such as {"ep_size": 2, "dp_size": 2, "moe_a2a_backend": "torch"}."""


class BadProfile(ValueError):  # noqa: N818 - reads as what is wrong
    """A profile that can't be used: names the file, the field, its value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One step of num_tokens, run straight and run split. Raises ValueError for counts below 1 and times that aren't positive."""

    num_tokens: int
    straight_s: float
    split_s: float

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")
        for name, seconds in (("straight_s", self.straight_s), ("split_s", self.split_s)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} at {self.num_tokens} tokens must be a positive time, got {seconds}")

    @property
    def wins(self) -> bool:
        """Split is faster than straight by MIN_GAIN or more."""
        return self.split_s <= self.straight_s * (1 - MIN_GAIN)


def summarise(num_tokens: int, straight_s: Sequence[float], split_s: Sequence[float]) -> Measurement:
    """Repeated timings of one token count -> their medians."""
    return Measurement(num_tokens=num_tokens, straight_s=median(straight_s), split_s=median(split_s))


def counts_to_measure(most: int) -> tuple[int, ...]:
    """Powers of two from 2 up to `most`, and `most` itself; () when nothing can be split."""
    powers = [1 << exponent for exponent in range(1, most.bit_length())]
    return tuple(sorted({*powers, most})) if most > 1 else ()


def split_threshold(measured: Sequence[Measurement]) -> int | None:
    """The least measured count from which splitting wins there and at every larger measured count; None: it doesn't at the largest.

    Beyond the largest count measured the step is taken to go on winning. Between a loss and a win the win's count is taken, so no
    count is split below a measured win. Raises ValueError for a count that is measured twice.
    """
    counts = [point.num_tokens for point in measured]
    if len(set(counts)) < len(counts):
        raise ValueError(f"a token count is measured twice: {sorted(counts)}")
    threshold = None
    for point in sorted(measured, key=lambda point: -point.num_tokens):
        if not point.wins:
            break
        threshold = point.num_tokens
    return threshold


def worst_regret(measured: Sequence[Measurement], threshold: int | None) -> float:
    """How much longer than the better way the chosen one takes at the worst measured count: 0.03 is 3% longer; 0 without any.

    Measure anew, with other samples than the threshold was found with, for an honest figure.
    """
    return max((_chosen(point, threshold) / min(point.straight_s, point.split_s) - 1 for point in measured), default=0.0)


def _chosen(point: Measurement, threshold: int | None) -> float:
    return point.split_s if threshold is not None and point.num_tokens >= threshold else point.straight_s


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measurements by forward mode; date as YYYY-MM-DD."""

    hardware: str
    date: str
    layout: Layout
    modes: Mapping[str, tuple[Measurement, ...]]

    def thresholds(self) -> dict[str, int | None]:
        """`split_threshold` of every mode."""
        return {mode: split_threshold(measured) for mode, measured in self.modes.items()}


def write_profile(profile: Profile, path: str | Path) -> None:
    """Write the file form, to be read by `read_profile`."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "hardware": profile.hardware,
        "date": profile.date,
        "layout": dict(profile.layout),
        "modes": {mode: [asdict(point) for point in measured] for mode, measured in profile.modes.items()},
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_profile(path: str | Path, *, layout: Layout, modes: Collection[str]) -> Profile:
    """Read a profile for this layout, with measurements of exactly these modes. Raises BadProfile, also for other layouts."""
    document = _read_document(path)
    found = _object(path, document, "layout")
    differing = [name for name in sorted({*layout, *found}) if layout.get(name) != found.get(name)]
    if differing:
        differences = (f"{name} {found.get(name, 'absent')}, this server has {layout.get(name, 'absent')}" for name in differing)
        raise BadProfile(
            f"{path}: measured with {'; with '.join(differences)}; "
            "give this layout's own file, or start without --tbo-profile to measure it"
        )
    measured = _object(path, document, "modes")
    if measured.keys() != set(modes):
        raise BadProfile(f"{path}: field 'modes' must hold {sorted(modes)}, it holds {sorted(measured)}")
    return Profile(
        hardware=_text(path, document, "hardware"),
        date=_text(path, document, "date"),
        layout=found,
        modes={mode: _measurements(path, mode, points) for mode, points in measured.items()},
    )


def _read_document(path: str | Path) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise BadProfile(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise BadProfile(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadProfile(f"{path}: not a calibration profile: field 'format' must be {FORMAT!r}")
    if document.get("version") != VERSION:
        raise BadProfile(f"{path}: version {document.get('version')!r} of the profile, this release reads {VERSION}: measure anew")
    return document


def _object(path: str | Path, document: dict[str, Any], name: str) -> dict[str, Any]:
    value = document.get(name)
    if not isinstance(value, dict):
        raise BadProfile(f"{path}: field {name!r} must be an object, got {type(value).__name__}")
    return value


def _text(path: str | Path, document: dict[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str):
        raise BadProfile(f"{path}: field {name!r} must be text, got {type(value).__name__}")
    return value


def _measurements(path: str | Path, mode: str, points: Any) -> tuple[Measurement, ...]:
    if not isinstance(points, list):
        raise BadProfile(f"{path}: mode {mode!r} must hold a list of measurements, got {type(points).__name__}")
    try:
        measured = tuple(_measurement(point) for point in points)
        split_threshold(measured)
    except ValueError as error:
        raise BadProfile(f"{path}: mode {mode!r}: {error}") from error
    return measured


def _measurement(point: Any) -> Measurement:
    names = {field.name for field in fields(Measurement)}
    if not isinstance(point, dict) or point.keys() != names:
        raise ValueError(f"a measurement must hold {sorted(names)}, got {point}")
    if not isinstance(point["num_tokens"], int) or any(not isinstance(value, int | float) for value in point.values()):
        raise ValueError(f"a measurement must hold a whole number of tokens and times in seconds, got {point}")
    return Measurement(**point)
