"""`moesaic preflight`: the flags of `moesaic serve`, and a table of what would stop it or slow it down, before any weight is read.

Run it on every node, as one would `serve`. Exit code 0 when nothing failed, 1 otherwise, 2 for a command line that can't be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moesaic.launch.args import parse_serve
from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import refuse
from moesaic.launch.console import make_console
from moesaic.launch.errors import ConfigError, RendezvousError
from moesaic.launch.layout_rules import layout_conflicts
from moesaic.launch.multi_node import make_meeting, node_name
from moesaic.launch.preflight.comparison import compare_nodes
from moesaic.launch.preflight.devices import check_devices
from moesaic.launch.preflight.exchange import exchange
from moesaic.launch.preflight.findings import Finding, fail, failed, finding_rows, merged, ok, render_findings
from moesaic.launch.preflight.libraries import versions
from moesaic.launch.preflight.limits import Needs, check_limits
from moesaic.launch.preflight.model_files import check_model
from moesaic.launch.preflight.network import check_network
from moesaic.launch.preflight.ports import check_ports
from moesaic.launch.preflight.tokenizer_files import check_tokenizer
from moesaic.launch.shared_gpu_rules import gpus_per_node
from moesaic.launch.startup import Plan, make_plan, shared_settings
from moesaic.launch.topology import Topology

USAGE = """\
usage: moesaic preflight [--json] [flags of `moesaic serve`]

Looks at ports, limits, model files, memory, GPUs, networks and versions, on this node and (with --nnodes) together with all others,
and says what to do. Run it on every node with the flags that `moesaic serve` will get. Exit code: 0, or 1 when something failed.
"""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one node has found. `settings`: what all nodes should have alike."""

    findings: tuple[Finding, ...]
    settings: dict[str, str]


def run_preflight(argv: Sequence[str]) -> int:
    """The arguments after `preflight`. Returns the exit code; raises ConfigError for a command line that can't be read."""
    if any(argument in {"--help", "-h"} for argument in argv):
        print(f"{USAGE}\n`moesaic serve --help` lists the flags.")
        return 0
    as_json = "--json" in argv
    config = parse_serve([argument for argument in argv if argument != "--json"])
    refuse(layout_conflicts(config))
    findings = preflight(config)
    if as_json:
        json.dump({"ok": not failed(findings), "findings": finding_rows(findings)}, sys.stdout, indent=1)
        print()
    else:
        make_console().print(render_findings(findings))
        print(_summary(findings))
    return 1 if failed(findings) else 0


def preflight(config: ServerConfig) -> list[Finding]:
    """Look at this node, and with several nodes meet the others: then every node has the rows of all. The layout must be sound."""
    look = look_around(config)
    if config.nnodes == 1:
        return list(look.findings)
    topology = Topology.from_config(config)
    names = tuple(node_name(topology, node) for node in range(config.nnodes))
    report = {"findings": finding_rows(look.findings), "settings": look.settings}
    try:
        exchanged = exchange(make_meeting(config, topology), report)
    except (RendezvousError, OSError) as error:
        missed = fail("nodes", str(error), "run the same preflight on every node at the same time")
        return [replace(finding, node=names[config.node_rank]) for finding in (*look.findings, missed)]
    of_nodes = [replace(Finding(**row), node=names[node]) for node, told in exchanged.reports.items() for row in told["findings"]]
    together = compare_nodes(names, exchanged, config.dist_timeout)
    return [*merged(of_nodes, len(exchanged.reports)), *(replace(finding, node="together") for finding in together)]


def look_around(config: ServerConfig) -> Look:
    """This node alone."""
    findings: list[Finding] = []
    settings: dict[str, str] = {}
    plan: Plan | None = None
    try:
        plan = make_plan(config)
        findings.append(ok("flags, layout and memory", "they fit: " + _memory_words(plan)))
        settings |= shared_settings(plan)
    except ConfigError as error:
        findings.append(fail("flags, layout and memory", str(error), "change the flags as said"))
    if plan is not None:
        model, files = check_model(config.model_path, plan.model, plan.resolution.config.load_format)
        findings += [model, check_tokenizer(config)]
        settings["checkpoint files"] = (
            "dummy" if files is None else f"{files.num_files} files of {files.num_bytes:,} bytes ({files.digest})"
        )
    findings.extend(check_ports(config))
    findings.extend(check_machine(config, cuda=needs_cuda(config, plan)))
    return Look(findings=tuple(findings), settings=settings | versions())


def check_machine(config: ServerConfig, *, cuda: bool) -> Iterator[Finding]:
    """Limits, devices and networks."""
    needs = needs_of(config, cuda=cuda)
    backend = config.moe_a2a_backend
    yield from check_limits(needs)
    yield from check_devices(needed=cuda, num_wanted=gpus_per_node(config, Topology.from_config(config)), a2a_backend=backend)
    deepep = backend.startswith("deepep")
    yield from check_network(config.dist_init_addr if config.nnodes > 1 else None, rdma=needs.rdma, deepep=deepep)


def needs_cuda(config: ServerConfig, plan: Plan | None) -> bool:
    """Whether the flags ask for CUDA, or chose it themselves because it is there."""
    asked = config.device == "cuda" or config.moe_a2a_backend not in {"none", "torch"}
    return asked or (plan is not None and plan.resolution.config.device == "cuda")


def needs_of(config: ServerConfig, *, cuda: bool) -> Needs:
    """What the flags ask of this node."""
    topology = Topology.from_config(config)
    return Needs(
        ranks_per_node=topology.ranks_per_node,
        world_size=topology.world_size,
        connections=config.max_running_requests or 256 * topology.dp_size,
        cuda=cuda,
        rdma=cuda and (config.nnodes > 1 or config.disaggregation_mode != "null"),
    )


def quick_look(config: ServerConfig, plan: Plan) -> list[Finding]:
    """What `moesaic serve` looks at itself before weights load: limits, the ports that it has not taken yet, files."""
    resolved = plan.resolution.config
    return [
        *check_limits(needs_of(config, cuda=resolved.device == "cuda")),
        *check_ports(config, served=False),
        check_model(config.model_path, plan.model, resolved.load_format)[0],
        check_tokenizer(config),
    ]


def refuse_unready(findings: Sequence[Finding]) -> list[str]:
    """Raise ConfigError for what failed; give back the warnings in words."""
    words = {
        status: [f"{one.what}: {one.found}; {one.remedy}" for one in findings if one.status == status]
        for status in ("fail", "warn")
    }
    if words["fail"]:
        raise ConfigError(
            "\n".join(["this node is not ready (`moesaic preflight` looks further):", *(f"  {line}" for line in words["fail"])])
        )
    return words["warn"]


def _memory_words(plan: Plan) -> str:
    return next(choice.chosen for choice in plan.resolution.choices if choice.capability == "memory plan")


def _summary(findings: Sequence[Finding]) -> str:
    counts: dict[str, Any] = {status: sum(one.status == status for one in findings) for status in ("ok", "warn", "fail")}
    verdict = "not ready" if counts["fail"] else "ready"
    return f"{verdict}: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed"
