"""`moesaic eplb report DUMP` and `moesaic eplb plan DUMP`: balancedness of a recorded load, and what to do about it.

Knows flags and terminals; what is computed and drawn lies in `eplb/`. Bad input raises ConfigError in one line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moesaic.eplb.algorithm import ALGORITHMS
from moesaic.eplb.load_record import BadLoadRecord, LoadRecord, load
from moesaic.eplb.location import BadLocation, ExpertLocation
from moesaic.eplb.location_file import load_location
from moesaic.eplb.plan_chart import chart_lines, chart_ticks
from moesaic.eplb.plan_html import render_plan_html
from moesaic.eplb.planner import DEFAULT_EP_SIZES, MAX_GPUS, PlanOptions, make_plan
from moesaic.eplb.replay import Cluster, solve
from moesaic.eplb.report import BadReport, balance_report
from moesaic.eplb.report_html import render_html
from moesaic.eplb.report_json import plan_json, report_json
from moesaic.eplb.report_png import MissingReportExtra, save_chart_png, save_report_png
from moesaic.launch.args import new_parser
from moesaic.launch.console import make_console
from moesaic.launch.eplb_tables import show_plan, show_report
from moesaic.launch.errors import ConfigError

_REFUSALS = (BadLoadRecord, BadLocation, BadReport, MissingReportExtra, OSError)


def run_eplb(arguments: Sequence[str]) -> int:
    """The arguments after `moesaic eplb`. Raises ConfigError for anything a person can cause; `--help` prints and exits."""
    namespace = _parser().parse_args(arguments)
    try:
        record = load(namespace.dump)
        namespace.run(namespace, record)
    except _REFUSALS as error:
        raise ConfigError(str(error)) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("moesaic eplb", "Expert balance of a recorded load (.npz, or SGLang's .pt).")
    commands = parser.add_subparsers(required=True, metavar="report|plan")
    _add_command(commands, "report", "how evenly placements carry the load", _report, _add_report_flags)
    _add_command(commands, "plan", "what-if over GPUs, redundant experts, policies and intervals", _plan, _add_plan_flags)
    return parser


def _add_command(
    commands: Any,
    name: str,
    description: str,
    run: Callable[[argparse.Namespace, LoadRecord], None],
    add_flags: Callable[[argparse.ArgumentParser], None],
) -> None:
    parser = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("dump", metavar="DUMP", help="load file: .npz, or .pt as SGLang writes it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write one self-contained page")
    parser.add_argument("--png", metavar="FILE", type=Path, help="also write a picture (needs moesaic[report])")
    parser.add_argument("--gpus-per-node", metavar="N", type=_number(1), default=8, help="[8]")
    parser.add_argument(
        "--num-expert-groups",
        metavar="N",
        type=_number(1),
        default=1,
        help="groups of group-limited routing; DeepSeek-V3 has 8 [1]",
    )
    add_flags(parser)


def _add_report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ep-size", metavar="N", type=_number(1, MAX_GPUS), help="GPUs [the placement's, else 8]")
    parser.add_argument(
        *("--num-redundant-experts", "--ep-num-redundant-experts"),
        metavar="N",
        type=_number(0),
        help="for the solved placement [an eighth of the experts, rounded up so that slots divide]",
    )
    parser.add_argument("--placement", metavar="FILE", help="also report this placement (.npz, .pt, .json or inline JSON)")
    parser.add_argument("--eplb-algorithm", choices=ALGORITHMS, default="auto", help="policy of the solved placement [auto]")
    parser.add_argument(
        "--num-hidden-layers", metavar="N", type=_number(1), help="of the model, dense ones too [the last sparse layer + 1]"
    )


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ep-size", metavar="N", type=_number(1, MAX_GPUS), help="recommend for so many GPUs [chosen by --target]")
    parser.add_argument(
        "--ep-sizes", metavar="N,N,...", type=_numbers(1, MAX_GPUS), default=DEFAULT_EP_SIZES, help="GPUs to sweep [8 to 320]"
    )
    parser.add_argument(
        *("--num-redundant-experts", "--ep-num-redundant-experts"),
        metavar="N,N,...",
        type=_numbers(0),
        help="[none, a 16th, an 8th and a quarter of the experts]",
    )
    parser.add_argument("--eplb-algorithm", metavar="NAME,...", type=_names, default=("auto", "deepseek"), help="[auto,deepseek]")
    parser.add_argument(
        "--interval", metavar="N,N,...", type=_numbers(1), help="windows between two rebalances [a third of all, and parts of that]"
    )
    parser.add_argument(
        "--target", metavar="X", type=_fraction, default=0.9, help="balancedness a chosen number of GPUs keeps [0.9]"
    )
    parser.add_argument("--expert-bytes", metavar="N", type=_number(1), help="of one expert of one layer [from the sizes below]")
    parser.add_argument("--hidden-size", metavar="N", type=_number(1), default=7168, help="[DeepSeek-V3's 7168]")
    parser.add_argument("--moe-intermediate-size", metavar="N", type=_number(1), default=2048, help="[DeepSeek-V3's 2048]")
    parser.add_argument("--expert-dtype", choices=("fp8", "bf16"), default="fp8", help="fp8 has a scale per 128 x 128 block [fp8]")


def _number(low: int, high: int | None = None) -> Callable[[str], int]:
    wanted = f"a number from {low} to {high}" if high is not None else f"a number, {low} or more"

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return int(text)

    return parse


def _numbers(low: int, high: int | None = None) -> Callable[[str], tuple[int, ...]]:
    parse = _number(low, high)
    return lambda text: tuple(sorted({parse(part) for part in text.split(",")}))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in ALGORITHMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(ALGORITHMS)}, got {unknown[0]!r}")
    return names


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction above 0 and at most 1, got {text!r}")
    return value


def _report(flags: argparse.Namespace, record: LoadRecord) -> None:
    placements = _placements(flags, record)
    report = balance_report(record, placements, source=flags.dump, num_hidden_layers=flags.num_hidden_layers)
    if flags.html:
        flags.html.write_text(render_html(report), encoding="utf-8")
    if flags.png:
        save_report_png(report, flags.png)
    if flags.json:
        print(json.dumps(report_json(report)))
    else:
        show_report(make_console(), report, [flags.html, flags.png])


def _placements(flags: argparse.Namespace, record: LoadRecord) -> dict[str, ExpertLocation]:
    """Without EPLB, the given placement, and a solve for this record; all on as many GPUs."""
    _, num_layers, num_experts = record.logical_count.shape
    _check_groups(flags, num_experts)
    given = None
    if flags.placement is not None:
        given = load_location(
            flags.placement,
            num_layers=num_layers,
            num_experts=num_experts,
            ep_size=flags.ep_size,
            layer_ids=record.layer_ids.tolist(),
        )
    ep_size = given.ep_size if given else flags.ep_size or 8
    num_nodes = ep_size // flags.gpus_per_node if ep_size % flags.gpus_per_node == 0 else 1
    trivial = ExpertLocation.trivial(
        num_layers=num_layers,
        num_experts=num_experts,
        num_slots=-(-num_experts // ep_size) * ep_size,
        ep_size=ep_size,
        num_nodes=num_nodes,
    )
    num_slots = _solved_slots(flags, num_experts, ep_size, given)
    cluster = Cluster(ep_size=ep_size, num_slots=num_slots, num_nodes=num_nodes, num_groups=flags.num_expert_groups)
    solved = solve(record.logical_count.sum(axis=0), cluster, flags.eplb_algorithm)
    placements = {"without EPLB": trivial}
    if given:
        placements["given placement"] = given
    return placements | {f"EPLB {flags.eplb_algorithm}": solved}


def _solved_slots(flags: argparse.Namespace, num_experts: int, ep_size: int, given: ExpertLocation | None) -> int:
    if flags.num_redundant_experts is None:
        return given.num_slots if given else -(-(num_experts + num_experts // 8) // ep_size) * ep_size
    num_slots: int = num_experts + flags.num_redundant_experts
    over = num_slots % ep_size
    if over:
        nearest = [
            value for value in (flags.num_redundant_experts - over, flags.num_redundant_experts + ep_size - over) if value >= 0
        ]
        raise BadReport(
            f"--num-redundant-experts {flags.num_redundant_experts}: {num_slots} slots can't be dealt evenly to --ep-size "
            f"{ep_size} GPUs; use {' or '.join(map(str, nearest))}"
        )
    return num_slots


def _check_groups(flags: argparse.Namespace, num_experts: int) -> None:
    if num_experts % flags.num_expert_groups:
        raise BadReport(f"--num-expert-groups {flags.num_expert_groups} doesn't divide the {num_experts} experts of {flags.dump}")


def _plan(flags: argparse.Namespace, record: LoadRecord) -> None:
    _check_groups(flags, record.logical_count.shape[2])
    options = PlanOptions(
        expert_bytes=flags.expert_bytes or _expert_bytes(flags),
        ep_sizes=flags.ep_sizes,
        algorithms=flags.eplb_algorithm,
        redundant=flags.num_redundant_experts,
        intervals=flags.interval,
        ep_size=flags.ep_size,
        gpus_per_node=flags.gpus_per_node,
        num_groups=flags.num_expert_groups,
        target=flags.target,
    )
    plan = make_plan(record, options, source=flags.dump)
    if flags.html:
        flags.html.write_text(render_plan_html(plan), encoding="utf-8")
    if flags.png:
        title = f"Balancedness against number of GPUs: {Path(flags.dump).name}"
        ticks = chart_ticks(plan)
        save_chart_png(chart_lines(plan), flags.png, title=title, x_label="GPUs", y_label="balancedness", x_ticks=ticks, log_x=True)
    if flags.json:
        print(json.dumps(plan_json(plan)))
    else:
        show_plan(make_console(), plan, [flags.html, flags.png])


def _expert_bytes(flags: argparse.Namespace) -> int:
    """Gate, up and down projection; fp8 with a float32 scale per 128 x 128 block."""
    hidden, intermediate = flags.hidden_size, flags.moe_intermediate_size
    weights: int = 3 * hidden * intermediate
    if flags.expert_dtype == "bf16":
        return 2 * weights
    blocks: int = 3 * -(-hidden // 128) * -(-intermediate // 128)
    return weights + 4 * blocks
