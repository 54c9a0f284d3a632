"""`moesaic timeline TRACE...`: a recorded timeline as tables, a picture and a page.

Knows flags and terminals; what is computed and drawn lies in `overlap/`. Bad input raises ConfigError in one line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.eplb.words import counted
from moesaic.launch.args import new_parser
from moesaic.launch.console import make_console
from moesaic.launch.errors import ConfigError
from moesaic.launch.timeline_html import render_timeline_html
from moesaic.launch.timeline_words import duration, number, share
from moesaic.overlap.timeline_picture import Picture, detail_picture, shown_step, whole_picture
from moesaic.overlap.timeline_png import MissingReportExtra, save_timeline_png
from moesaic.overlap.timeline_report import TimelineReport, report_json, timeline_report
from moesaic.overlap.trace import BadTrace, Trace, merge
from moesaic.overlap.trace_file import load_trace

_REFUSALS = (BadTrace, MissingReportExtra, OSError)


def run_timeline(arguments: Sequence[str]) -> int:
    """The arguments after `moesaic timeline`. Raises ConfigError for anything a person can cause; `--help` prints and exits."""
    flags = _parser().parse_args(arguments)
    try:
        _run(flags)
    except _REFUSALS as error:
        raise ConfigError(str(error)) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("moesaic timeline", "What ran when, and how much communication was hidden under computation.")
    parser.add_argument(
        "traces", metavar="TRACE", nargs="+", help="written by /start_profile; several: of the ranks of one machine"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write one self-contained page")
    parser.add_argument("--png", metavar="FILE", type=Path, help="also write a picture (needs moesaic[report])")
    parser.add_argument("--step", metavar="N", type=int, help="the step to draw [the one of median time]")
    parser.add_argument("--rank", metavar="N", type=int, help="only this rank [all; the first 4 are drawn]")
    return parser


def _run(flags: argparse.Namespace) -> None:
    source = ", ".join(flags.traces)
    trace = merge(load_trace(path) for path in flags.traces)
    if flags.rank is not None:
        trace = trace.only(rank=flags.rank)
    report = timeline_report(trace, source=source)
    pictures = _pictures(trace, flags.step)
    if flags.html:
        flags.html.write_text(render_timeline_html(report, pictures), encoding="utf-8")
    if flags.png:
        save_timeline_png(pictures, flags.png, title=f"Timeline: {', '.join(Path(path).name for path in flags.traces)}")
    if flags.json:
        print(json.dumps(report_json(report)))
    else:
        _show(make_console(), report, [path for path in (flags.html, flags.png) if path])


def _pictures(trace: Trace, step: int | None) -> list[Picture]:
    """The step, and its middle layers close."""
    chosen = shown_step(trace) if step is None else step
    drawn = trace if chosen is None else trace.only(step=chosen)
    detail = detail_picture(drawn)
    return [whole_picture(drawn)] if detail is None else [whole_picture(drawn), detail]


def _show(console: Console, report: TimelineReport, files: Sequence[Path]) -> None:
    steps = (
        "" if report.median_step_us is None else f", {counted(len(report.step_us), 'step')} of {duration(report.median_step_us)}"
    )
    unfinished = f", {report.num_unfinished} communications unfinished" if report.num_unfinished else ""
    facts = f"{escape(report.source)}: {counted(len(report.ranks), 'rank')}{steps}{unfinished}"
    console.print(f"[bold]timeline[/bold]  {facts}", highlight=False)
    console.print(f"hidden communication: [bold]{share(report.hidden_share)}[/bold]", highlight=False)
    console.print(f"idle computation row: [bold]{share(report.idle_share)}[/bold]", highlight=False)
    console.print(_rank_table(report))
    console.print(_kind_table(report))
    if report.waits:
        console.print(_wait_table(report))
    console.print("hidden: share of the time with a communication under way in which the rank computed; sums over the recording")
    for path in files:
        console.print(f"written: {path}", highlight=False, markup=False)


def _rank_table(report: TimelineReport) -> Table:
    table = _table("rank", "step (median)", "computation", "communication", "hidden", "waits", "idle")
    for rank in report.ranks:
        times = (duration(time) for time in (rank.step_us, rank.computation_us, rank.communication_us))
        table.add_row(f"{rank.rank}", *times, share(rank.hidden_share), duration(rank.wait_us), share(rank.idle_share))
    return table


def _kind_table(report: TimelineReport) -> Table:
    table = _table("name", "times", "mean", "sum", "hidden")
    row = ""
    for kind in report.kinds:
        if kind.row != row:
            row = kind.row
            table.add_row(f"[bold]{row}[/bold]")
        table.add_row(
            escape(kind.name), f"{kind.count:,}", duration(kind.mean_us), duration(kind.total_us), share(kind.hidden_share)
        )
    return table


def _wait_table(report: TimelineReport) -> Table:
    table = _table("longest waits for", "rank", "step", "micro-batch", "time")
    for span in report.waits:
        where = (f"{span.rank}", number(span.step), number(span.micro_batch))
        table.add_row(escape(span.title), *where, duration(span.duration_ns / 1000))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table
