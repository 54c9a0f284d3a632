"""What preflight finds: one row per thing looked at. Data, its table and its JSON; knows nothing of how it is found out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "warn", "fail"]
NOT_HERE = "not on this machine"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`found`: what is there. `remedy`: what to do about it; none for ok. `node`: whose it is, "" for all nodes together."""

    what: str
    status: Status
    found: str
    remedy: str = ""
    node: str = ""

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (not self.remedy), f"{self.what}: what is not ok has a remedy, and only that"


def ok(what: str, found: str) -> Finding:
    return Finding(what=what, status="ok", found=found)


def warn(what: str, found: str, remedy: str) -> Finding:
    return Finding(what=what, status="warn", found=found, remedy=remedy)


def fail(what: str, found: str, remedy: str) -> Finding:
    return Finding(what=what, status="fail", found=found, remedy=remedy)


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.status == "fail" for finding in findings)


def merged(findings: Sequence[Finding], num_nodes: int) -> list[Finding]:
    """Rows that all nodes have alike become one, of "all nodes", where the first of them was."""
    alike: dict[Finding, set[str]] = {}
    for finding in findings:
        alike.setdefault(replace(finding, node=""), set()).add(finding.node)
    rows = []
    for finding, nodes in alike.items():
        if len(nodes) == num_nodes > 1:
            rows.append(replace(finding, node="all nodes"))
        else:
            rows.extend(replace(finding, node=node) for node in sorted(nodes))
    return rows


def finding_rows(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """As JSON-able rows."""
    return [asdict(finding) for finding in findings]


def render_findings(findings: Sequence[Finding]) -> Table:
    """As a table for the terminal; with a column for the node where there are several."""
    from rich.markup import escape
    from rich.table import Table

    several = any(finding.node for finding in findings)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(*(["node"] if several else []), "what", "", "found", "what to do")
    for finding in findings:
        node = [escape(finding.node)] if several else []
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(*node, escape(finding.what), status, escape(finding.found), escape(finding.remedy) or "-")
    return table
