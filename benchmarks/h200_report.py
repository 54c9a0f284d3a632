"""What benchmarks/h200.py found: one result per case, as JSON and as a Markdown table, written anew after every case.

A run that is cut off loses nothing but the case it was at, and says which that was.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from h200_timing import Ceilings


@dataclass(kw_only=True)
class Result:
    """One case. `time_us` with tensors where they lie, `cold_us` (small cases) without them in the L2 cache; `floor_share` is the
    floor over the longer time: 1 is as fast as the machine can. `problem` says why there is no time.
    """

    name: str
    size: str
    floor_us: float
    bound: str
    time_us: float | None = None
    cold_us: float | None = None
    floor_share: float | None = None
    error: float | None = None
    peers_us: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    is_wrong: bool = False

    @property
    def line(self) -> str:
        if self.time_us is None or self.floor_share is None:
            return f"{self.name:30} {self.size:60} {self.problem}"
        peers = ", ".join(f"{name} {us:.1f} us ({us / self.time_us:.2f}x)" for name, us in self.peers_us.items())
        cold = "" if self.cold_us is None else f" (cold {self.cold_us:.1f})"
        share = f"{self.time_us:9.1f} us{cold}  floor {self.floor_us:9.1f} ({self.bound})  {self.floor_share:6.1%}"
        return f"{self.name:30} {self.size:60} {share}  {peers}  {'; '.join(self.notes)}"


@dataclass(kw_only=True)
class Report:
    """The results so far, of one machine."""

    folder: Path
    machine: dict[str, str]
    ceilings: Ceilings
    results: list[Result] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Report | None:
        """As it was written there; None where none was."""
        path = folder / "report.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        results = [Result(**each) for each in found["results"]]
        return cls(folder=folder, machine=found["machine"], ceilings=Ceilings(**found["ceilings"]), results=results)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {"machine": self.machine, "ceilings": asdict(self.ceilings), "results": [asdict(each) for each in self.results]}
        for name, text in (("report.json", json.dumps(found, indent=1)), ("report.md", self._table())):
            part = self.folder / f"{name}.part"
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(self.folder / name)

    def summary(self) -> str:
        """JSON in one line."""
        wrong = sum(each.is_wrong for each in self.results)
        return json.dumps({"ceilings": asdict(self.ceilings), "cases": len(self.results), "wrong": wrong})

    def _table(self) -> str:
        head = [
            f"# {self.machine['device']}, {time.strftime('%Y-%m-%d')}",
            "",
            f"torch {self.machine['torch']}; {self.ceilings}, measured in this run.",
            "",
            "| kernel | size | us | us with a cold L2 | floor, us | floor / time | peers, us | notes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        return "\n".join(head + [_row(each) for each in self.results])


def _row(result: Result) -> str:
    times = f"{_number(result.time_us)} | {_number(result.cold_us)} | {result.floor_us:.1f} ({result.bound})"
    share = "" if result.floor_share is None else f"{result.floor_share:.0%}"
    peers = ", ".join(f"{name} {us:.1f}" for name, us in result.peers_us.items())
    return f"| {result.name} | {result.size} | {times} | {share} | {peers} | {result.problem or '; '.join(result.notes)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
