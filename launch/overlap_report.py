"""The calibration of two-batch overlap in words and as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.overlap.calibration import Measurement, Profile

if TYPE_CHECKING:
    from rich.table import Table


def threshold_words(profile: Profile) -> str:
    """Such as "prefill from 64 tokens per DP rank, decode never"."""
    return ", ".join(
        f"{mode} never" if threshold is None else f"{mode} from {threshold} tokens per DP rank"
        for mode, threshold in profile.thresholds().items()
    )


def render_profile(profile: Profile) -> Table:
    """A row per token count, and for each forward mode the step straight and split, in ms; "split" where it is what will run."""
    from rich.table import Table

    table = Table(title=f"two-batch overlap: {threshold_words(profile)}", title_justify="left", title_style="")
    table.add_column("tokens per DP rank", justify="right")
    for mode in profile.modes:
        table.add_column(f"{mode}: straight ms", justify="right")
        table.add_column("split ms", justify="right")
        table.add_column("runs")
    thresholds = profile.thresholds()
    points = {mode: {point.num_tokens: point for point in measured} for mode, measured in profile.modes.items()}
    for count in sorted({count for measured in points.values() for count in measured}):
        cells = (_cells(measured.get(count), thresholds[mode]) for mode, measured in points.items())
        table.add_row(f"{count:,}", *(cell for row in cells for cell in row))
    return table


def _cells(point: Measurement | None, threshold: int | None) -> tuple[str, str, str]:
    if point is None:
        return "", "", ""
    splits = threshold is not None and point.num_tokens >= threshold
    return f"{point.straight_s * 1e3:.2f}", f"{point.split_s * 1e3:.2f}", "split" if splits else "straight"
