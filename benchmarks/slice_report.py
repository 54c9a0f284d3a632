"""What rank_slice.py says: figures of every case from shapes, tables and times, as JSON, as Markdown and as lines for a terminal.

Knows no device. A case that was not run has its floors and what the tables say of its communication, and no times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bare_import  # noqa: F401  before anything of moesaic
from slice_cases import Case
from slice_network import RANKS_PER_NODE, SOURCE
from slice_roofline import BANDWIDTH_H100_OVER_H200, GROUPS, Group, Machine, Work, step_work
from slice_run import VARIANTS, Measured, Variant, needed_bytes

from moesaic.launch.models.config import ModelConfig

PUBLISHED: dict[str, tuple[float, str]] = {
    "SGLang prefill 1024": (57_700, "SGLang 2025-05, 4 x 8 H100, EP32, 16,384 tokens per device, 1k inputs"),
    "SGLang prefill 2048": (54_500, "SGLang 2025-05, 4 x 8 H100, EP32, 16,384 tokens per device, 2k inputs (52.3k in its summary)"),
    "SGLang prefill 4096": (50_300, "SGLang 2025-05, 4 x 8 H100, EP32, 16,384 tokens per device, 4k inputs"),
    "SGLang decode": (22_300, "SGLang 2025-05, 9 x 8 H100, EP72, batch 256 per GPU, 2k inputs, 288 slots"),
    "DeepSeek prefill": (73_700, "DeepSeek production, H800, EP32, cache hits included"),
    "DeepSeek decode": (14_800, "DeepSeek production, H800, EP144, 18 nodes"),
}
"""Tokens per second per node of 8 GPUs, from REFERENCE.md."""

STEP_COLUMNS = (
    "case",
    "step alone, ms",
    "straight, ms",
    "two-batch, ms",
    "tok/s/GPU",
    "tok/s/node",
    "H100, derived",
    "published",
    "floor / alone",
    "communication hidden",
)
"""tok/s: of the better of straight and two-batch."""
MEASURED = """Measured: the steps of one rank on this machine (on a GPU by CUDA events, decode as a CUDA graph, prefill with its
launches): all layers' attention, gate, expert, shared, dense and head kernels, and the copies around the experts. Real are their
sizes and dtypes, the layers, their order, the two-batch schedule and the memory they need."""
ASSUMED = f"""Assumed: random weights; how many rows the rank receives and how they fall on its experts (slice_traffic.py); that
this rank is the busiest in every layer, so that its step is the cluster's; the time of every dispatch and combine (`straight` and
`two_batch` wait for it): {SOURCE}, interpolated as slice_network.py says. Communication takes no multiprocessors, memory or
network from the computation but for its copies here. Left out: scheduling and sampling between steps, step headers, rebalancing,
KV transfer, prefix hits, and requests that are not there."""
DERIVED = f"""Derived: H100 from H200 figures: groups of operations that the roofline calls memory-bound take
1 / {BANDWIDTH_H100_OVER_H200:.3f} times as long (3.35 against 4.8 TB/s in the data sheets), the others as long; what communication
adds is kept. A node is 8 GPUs."""


def case_report(
    config: ModelConfig, case: Case, machine: Machine, measured: Measured | None, problem: str | None
) -> dict[str, Any]:
    """JSON-able; the same keys for every case."""
    share = case.share(config)
    work = step_work(config, share)
    dispatch_s, combine_s = case.communication_s(config, case.num_tokens)
    num_sparse = len(config.sparse_layers)
    floor_ms = sum(machine.seconds(each) for each in work.values()) * 1e3
    step_ms = measured.step_ms if measured is not None else {}
    communication_ms = (dispatch_s + combine_s) * num_sparse * 1e3
    return {
        "name": case.name,
        "phase": case.phase,
        "dispatch_mode": case.mode.value,
        "ep_size": case.ep_size,
        "num_slots": case.num_slots,
        "num_tokens": case.num_tokens,
        "context": case.context,
        "balancedness": case.balancedness,
        "rows_per_layer": share.num_rows,
        "received_tokens_per_layer": share.num_received,
        "needed_bytes": needed_bytes(config, case),
        "groups": {group: _group(work[group], machine, group, measured) for group in GROUPS},
        "flops": sum(each.num_flops for each in work.values()),
        "bytes": sum(each.num_bytes for each in work.values()),
        "floor_ms": floor_ms,
        "tabulated_communication_ms": communication_ms,
        "floor_tokens_per_s_per_node": _per_node(case, max(floor_ms, communication_ms)),
        "floor_tokens_per_s_per_node_nothing_hidden": _per_node(case, floor_ms + communication_ms),
        "variants": {name: _variant(case, name, step_ms) for name in VARIANTS},
        "roofline_share": floor_ms / step_ms["alone"] if "alone" in step_ms else None,
        "hidden_share": _hidden_share(step_ms, communication_ms),
        "derived_h100": _derived(case, machine, work, measured),
        "published_tokens_per_s_per_node": {name: PUBLISHED[name][0] for name in _published(case)},
        "captured": measured is not None and measured.captured,
        "notes": [] if measured is None else measured.notes,
        "problem": problem,
    }


def _group(work: Work, machine: Machine, group: Group, measured: Measured | None) -> dict[str, Any]:
    return {
        "flops": dict(work.flops),
        "bytes": work.num_bytes,
        "floor_ms": machine.seconds(work) * 1e3,
        "bound": "memory" if machine.is_memory_bound(work) else "operations",
        "ms": None if measured is None else measured.group_ms[group],
    }


def _variant(case: Case, name: Variant, step_ms: dict[Variant, float]) -> dict[str, float | None]:
    """over_alone_ms: what communication, and splitting, add to the step without communication."""
    if name not in step_ms:
        return dict.fromkeys(("step_ms", "over_alone_ms", "tokens_per_s", "tokens_per_s_per_node"))
    per_node = _per_node(case, step_ms[name])
    return {
        "step_ms": step_ms[name],
        "over_alone_ms": step_ms[name] - step_ms["alone"],
        "tokens_per_s": per_node / RANKS_PER_NODE,
        "tokens_per_s_per_node": per_node,
    }


def _per_node(case: Case, step_ms: float) -> float:
    return RANKS_PER_NODE * case.num_tokens / step_ms * 1e3


def _hidden_share(step_ms: dict[Variant, float], communication_ms: float) -> float | None:
    """Share of a straight step's tabulated communication that the two-batch step does not show; below 0 where splitting costs more.
    None where communication is too short to tell.
    """
    if "two_batch" not in step_ms or communication_ms < 0.05 * step_ms["alone"]:
        return None
    return 1 - (step_ms["two_batch"] - step_ms["alone"]) / communication_ms


def _derived(case: Case, machine: Machine, work: dict[Group, Work], measured: Measured | None) -> dict[str, float] | None:
    """Tokens per second per node of H100s by variant; None but for figures of an H200."""
    if measured is None or "H200" not in machine.name:
        return None
    spent = measured.group_ms
    longer = {group: 1 / BANDWIDTH_H100_OVER_H200 if machine.is_memory_bound(work[group]) else 1.0 for group in spent}
    ratio = sum(ms * longer[group] for group, ms in spent.items()) / sum(spent.values())
    alone = measured.step_ms["alone"]
    return {name: _per_node(case, alone * ratio + measured.step_ms[name] - alone) for name in VARIANTS}


def _published(case: Case) -> list[str]:
    names = [] if case.published is None else [case.published]
    return [*names, *(["DeepSeek prefill"] if names and case.phase == "prefill" else [])]


def write_report(folder: Path, machine: Machine, reports: list[dict[str, Any]], title: str) -> None:
    """report.json and report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "title": title,
        "machine": {"name": machine.name, "copy": machine.copy, "rates": machine.rates, "source": machine.source},
        "measured": _unwrapped(MEASURED),
        "assumed": _unwrapped(ASSUMED),
        "derived": _unwrapped(DERIVED),
        "published": {name: {"tokens_per_s_per_node": figure, "of": of} for name, (figure, of) in PUBLISHED.items()},
        "cases": reports,
    }
    (folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text("\n".join(_markdown(machine, reports, title)) + "\n", encoding="utf-8")


def _markdown(machine: Machine, reports: list[dict[str, Any]], title: str) -> Iterable[str]:
    yield from (f"# {title}", "", f"Floors: {machine.name}, {machine.source}.", "")
    for words in (MEASURED, ASSUMED, DERIVED):
        yield from (_unwrapped(words), "")
    yield f"| {' | '.join(STEP_COLUMNS)} |"
    yield "|---" * len(STEP_COLUMNS) + "|"
    yield from (f"| {' | '.join(step_row(report))} |" for report in reports)
    yield from ("", f"Milliseconds per step (and their floors): {', '.join(GROUPS)}.", "")
    yield f"| case | {' | '.join(GROUPS)} | rows | bound by |"
    yield "|---|" + "---|" * (len(GROUPS) + 2)
    yield from (f"| {' | '.join(group_row(report))} |" for report in reports)
    yield ""
    yield from (f"- {name}: {figure / 1000:.1f}k tok/s/node ({of})" for name, (figure, of) in PUBLISHED.items())
    notes = [f"- {report['name']}: {note}" for report in reports for note in (*report["notes"], report["problem"]) if note]
    yield from ["", *notes]


def step_row(report: dict[str, Any]) -> list[str]:
    """Case, three step times, tokens per second of the better way, derived, published, shares."""
    variants = report["variants"]
    better = max(("straight", "two_batch"), key=lambda name: variants[name]["tokens_per_s"] or 0.0)
    derived = report["derived_h100"]
    return [
        report["name"],
        *(_number(variants[name]["step_ms"], 1) for name in VARIANTS),
        _number(variants[better]["tokens_per_s"], 0),
        _number(variants[better]["tokens_per_s_per_node"], 0),
        _number(None if derived is None else derived[better], 0),
        ", ".join(f"{figure:,.0f}" for figure in report["published_tokens_per_s_per_node"].values()),
        _percent(report["roofline_share"]),
        _percent(report["hidden_share"]),
    ]


def group_row(report: dict[str, Any]) -> list[str]:
    """Case, each group's milliseconds and floor, rows of a layer, the groups that memory bounds."""
    groups = report["groups"]
    memory = [name for name, group in groups.items() if group["bound"] == "memory" and group["bytes"]]
    times = [f"{_number(group['ms'], 1)} ({group['floor_ms']:.1f})" for group in groups.values()]
    return [report["name"], *times, f"{report['rows_per_layer']:,}", f"memory: {', '.join(memory)}"]


def plan_line(report: dict[str, Any]) -> str:
    """What would run, and what its floors allow."""
    size = sum(report["needed_bytes"].values()) / 1e9
    floor, network = report["floor_ms"], report["tabulated_communication_ms"]
    most, least = report["floor_tokens_per_s_per_node"], report["floor_tokens_per_s_per_node_nothing_hidden"]
    published = ", ".join(f"{figure:,.0f}" for figure in report["published_tokens_per_s_per_node"].values())
    return (
        f"{report['name']:42} {report['rows_per_layer']:7,} rows/layer  {size:6.1f} GB  floor {floor:7.1f} ms  "
        f"network {network:7.1f} ms  at most {least:9,.0f} (nothing hidden) to {most:9,.0f} tok/s/node"
        f"{f'  published {published}' if published else ''}"
    )


def result_line(report: dict[str, Any]) -> str:
    if report["problem"]:
        return f"{report['name']:42} {report['problem']}"
    _, alone, straight, two_batch, per_gpu, per_node, derived, published, share, hidden = step_row(report)
    groups = "  ".join(f"{name} {group['ms']:.1f}" for name, group in report["groups"].items())
    return (
        f"{report['name']:42} alone {alone} ms, straight {straight}, two-batch {two_batch}; "
        f"{per_gpu} tok/s/GPU, {per_node} tok/s/node"
        f"{f' (H100: {derived})' if derived else ''}{f', published {published}' if published else ''}; {share} of the roofline"
        f"{f', {hidden} of the communication hidden' if hidden else ''}\n{'':42} {groups}"
    )


def _unwrapped(text: str) -> str:
    return " ".join(text.split())


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
