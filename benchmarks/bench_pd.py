"""Prefill/decode disaggregation against one server: how even the tokens come, how fast KV travels, what the handover costs.

1. Transfers (`pd_transfer.py`): rooms through the whole protocol against a bare copy by the same transport. `transfer_share`: the
   lowest throughput of rooms over that of the copy; target 0.8.
2. Load (`pd_load.py`): long prompts among running decodes, on the same number of ranks: unified (tp 2, dp 2, chunked prefill) and a
   prefill and a decode server of one rank each. `itl_p99_ratio`: the 99th percentile of the time between two tokens of running
   requests, PD over unified; target 0.5. `handover_steps`: from the end of prefill's last chunk to the first token on
   decode, in decode steps; target 1.3. The floor is 0 steps; a room that arrives at any time waits half a step for the running one.

    python benchmarks/bench_pd.py [--parts transfer load] [--backends tcp nixl] [--seconds 40] [--png FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pd_load import Load, draw, measure_load
from pd_transfer import Shape, measure_transports

PNG = Path(__file__).parent / "results" / "pd-itl.png"


def main() -> None:
    # All is on loopback, and with its InfiniBand module nixl's UCX crashes when the process ends.
    os.environ.setdefault("UCX_MODULES", "^ib")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["transfer", "load"], choices=["transfer", "load"])
    transfer = parser.add_argument_group("transfer")
    transfer.add_argument("--backends", nargs="+", default=["tcp", "nixl"], choices=["tcp", "nixl", "mooncake"])
    transfer.add_argument("--rooms", type=int, default=4)
    transfer.add_argument("--pages", type=int, default=64, help="per room")
    transfer.add_argument("--run-pages", type=int, default=8)
    transfer.add_argument("--chunk-pages", type=int, default=16)
    transfer.add_argument("--layers", type=int, default=61, help="of latent KV [%(default)s, DeepSeek-V3's]")
    transfer.add_argument("--rounds", type=int, default=7)
    load = parser.add_argument_group("load")
    load.add_argument("--seconds", type=float, default=40.0, help="of load on each of the two")
    load.add_argument("--running", type=int, default=8, help="requests that decode at any time")
    load.add_argument("--long-tokens", type=int, default=1800, help="tokens of a long prompt")
    load.add_argument("--interval", type=float, default=2.0, help="seconds between two long prompts")
    load.add_argument("--chunk", type=int, help="prompt tokens per step, of each prefilling rank (what the server takes by itself)")
    load.add_argument("--png", type=Path, default=PNG, help="where to draw the times between tokens [%(default)s]")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if "transfer" in args.parts:
        shape = Shape(
            rooms=args.rooms, pages=args.pages, run_pages=args.run_pages, chunk_pages=args.chunk_pages, layers=args.layers
        )
        shares = measure_transports(args.backends, shape, args.rounds)
        result |= {"transfer_share": min(shares.values(), default=None), "transfer_share_by_transport": shares}
    if "load" in args.parts:
        case = Load(
            seconds=args.seconds, running=args.running, long_tokens=args.long_tokens, interval_s=args.interval, chunk=args.chunk
        )
        unified, pd = measure_load(case)
        draw(case, unified, pd, args.png)
        result |= {"itl_p99_ratio": round(pd.itl_p99_s / unified.itl_p99_s, 3), **pd.handover_figures()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
