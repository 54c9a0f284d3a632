"""A timeline and its figures as one HTML page. It lies here because it puts overlap's picture on the page of eplb's reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moesaic.eplb.html_page import page, table
from moesaic.eplb.words import counted
from moesaic.launch.timeline_words import duration, number, share
from moesaic.overlap.timeline_picture import Picture
from moesaic.overlap.timeline_report import TimelineReport
from moesaic.overlap.timeline_svg import SCRIPT, STYLE, legend, timeline_svg

_COLOURS = """
:root{--m0:#c2410c;--m1:#1d4ed8;--alarm:#dc2626}
@media(prefers-color-scheme:dark){:root{--m0:#d9621a;--m1:#4a7df0;--alarm:#f87171}}
"""


def render_timeline_html(report: TimelineReport, pictures: Sequence[Picture]) -> str:
    """The whole document: no script, style, font or picture is fetched from anywhere."""
    sections = [_header(report), _lead(report), legend(), *map(_picture, pictures), _ranks(report), _kinds(report), _waits(report)]
    return page(f"Timeline: {report.source}", [f"<style>{_COLOURS}{STYLE}</style>", *sections], script=SCRIPT)


def _header(report: TimelineReport) -> str:
    facts = [counted(len(report.ranks), "rank")]
    if report.median_step_us is not None:
        facts += [counted(len(report.step_us), "step"), f"{duration(report.median_step_us)} at the median"]
    if report.num_unfinished:
        facts.append(f"{counted(report.num_unfinished, 'communication')} unfinished and left out")
    return f'<h1>Timeline</h1><p class="soft">{escape(report.source)}: {", ".join(facts)}</p>'


def _lead(report: TimelineReport) -> str:
    hidden = (
        "No communication was recorded."
        if report.hidden_share is None
        else f"<b>{report.hidden_share:.1%}</b> of the communication time was hidden under computation."
    )
    return f'<p class="lead">{hidden} The computation row was idle for <b>{report.idle_share:.1%}</b> of the steps.</p>'


def _picture(picture: Picture) -> str:
    left_out = f"; {counted(picture.left_out, 'more rank')} not drawn" if picture.left_out else ""
    hint = f'<p class="soft">Wheel: zoom. Drag: move. Double click: all of it{left_out}.</p>'
    return f"<h2>{escape(picture.title)}</h2>{hint}{timeline_svg(picture)}"


def _ranks(report: TimelineReport) -> str:
    rows = [
        [
            f"{rank.rank}",
            duration(rank.step_us),
            duration(rank.computation_us),
            duration(rank.communication_us),
            share(rank.hidden_share),
            duration(rank.wait_us),
            share(rank.idle_share),
        ]
        for rank in report.ranks
    ]
    head = ["rank", "step (median)", "computation", "communication", "hidden", "waits", "idle"]
    note = (
        "Sums over the recording, but for the step. <i>Hidden</i>: share of the time with a communication under way in which the "
        "rank computed. <i>Idle</i>: share of the steps in which it did not compute. A communication lasts from its submit to its "
        "completion, and so includes the time other ranks come late."
    )
    return f'<h2>Ranks</h2>{table(head, rows)}<p class="soft">{note}</p>'


def _kinds(report: TimelineReport) -> str:
    rows = [
        [escape(kind.name), kind.row, f"{kind.count:,}", duration(kind.mean_us), duration(kind.total_us), share(kind.hidden_share)]
        for kind in report.kinds
    ]
    return f"<h2>Where the time goes</h2>{table(['name', 'row', 'times', 'mean', 'sum', 'hidden'], rows, numeric_from=2)}"


def _waits(report: TimelineReport) -> str:
    """Nothing when no wait was recorded."""
    if not report.waits:
        return ""
    rows = [
        [escape(span.title), f"{span.rank}", number(span.step), number(span.micro_batch), duration(span.duration_ns / 1000)]
        for span in report.waits
    ]
    return f"<h2>Longest waits</h2>{table(['for', 'rank', 'step', 'micro-batch', 'time'], rows)}"
