"""The command `moesaic`: `moesaic serve ...`, `moesaic preflight ...`, `moesaic eplb ...` and others.

Knows which subcommand goes where and how errors look on a terminal; everything heavy is imported by the subcommand that
needs it. Exit codes: 0 a clean stop, 1 a server that failed while running (or a preflight that found a failure), 2 a start that was
refused, 130 Ctrl-C before the start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from moesaic.launch.args import parse_serve
from moesaic.launch.config import ServerConfig
from moesaic.launch.errors import ConfigError, RankFailedError
from moesaic.launch.foreign import environment_notes, flag_notes
from moesaic.launch.version import version

USAGE = """\
usage: moesaic serve --model-path DIR [flags]    serve a model over HTTP (`moesaic serve --help` lists the flags)
       moesaic serve --model-path demo           serve the small model that comes with moesaic
       moesaic preflight [flags of serve]        what would stop or slow it, on this node and all others, before weights load
       moesaic router [flags of sglang-router]   the router in front of servers, also of prefill and decode servers
       moesaic pd-demo                           a prefill server, a decode server and the router, with the small model
       moesaic eplb report DUMP                  balancedness of a recorded expert load
       moesaic eplb plan DUMP                    what-if: GPUs, redundant experts, policies, intervals
       moesaic timeline TRACE...                 what ran when, and how much communication was hidden
       moesaic deploy-files DIR                  Slurm scripts and Kubernetes manifests, to be adapted
       moesaic --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    match arguments:
        case ["--version" | "-V", *_]:
            print(f"moesaic {version()}")
            return 0
        case ["serve", *rest]:
            return _serve(rest)
        case ["preflight", *rest]:
            return _preflight(rest)
        case ["deploy-files", *rest]:
            return _deploy_files(rest)
        case ["router", *rest]:
            return _several("router", rest)
        case ["pd-demo", *rest]:
            return _several("pd-demo", rest)
        case ["eplb", *rest]:
            return _report("eplb", rest)
        case ["timeline", *rest]:
            return _report("timeline", rest)
        case [] | ["--help" | "-h" | "help", *_]:
            print(USAGE, end="")
            return 0 if arguments else 2
        case [unknown, *_]:
            print(f"moesaic: unknown command {unknown!r}\n{USAGE}", end="", file=sys.stderr)
            return 2
    raise AssertionError("every argument list is matched")


def _serve(arguments: list[str]) -> int:
    try:
        config = parse_serve(arguments)
        for note in (*flag_notes(arguments), *environment_notes(os.environ)):
            print(f"moesaic serve: note: {note}", file=sys.stderr)
        # Before torch is loaded: its C++ side prints a page of stack frames when a peer goes away, which we say in a line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return _load_server()(config)
    except ConfigError as error:
        print(f"moesaic serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moesaic serve: interrupted before it started", file=sys.stderr)
        return 130
    except RankFailedError as error:
        print(f"moesaic serve: {error}", file=sys.stderr)
        return 1


def _preflight(arguments: list[str]) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from moesaic.launch.preflight.command import run_preflight

        return run_preflight(arguments)
    except ConfigError as error:
        print(f"moesaic preflight: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moesaic preflight: interrupted", file=sys.stderr)
        return 130


def _deploy_files(arguments: list[str]) -> int:
    from moesaic.launch.deploy_files import run_deploy_files

    try:
        return run_deploy_files(arguments)
    except ConfigError as error:
        print(f"moesaic deploy-files: {error}", file=sys.stderr)
        return 2


def _several(command: Literal["router", "pd-demo"], arguments: list[str]) -> int:
    """What is there for several servers."""
    try:
        if command == "router":
            from moesaic.launch.router_cli import run_router

            return run_router(arguments)
        from moesaic.launch.pd_demo import run_pd_demo

        return run_pd_demo(arguments)
    except ConfigError as error:
        print(f"moesaic {command}: {error}", file=sys.stderr)
        return 2
    except RankFailedError as error:
        print(f"moesaic {command}: {error}", file=sys.stderr)
        return 1


def _report(command: Literal["eplb", "timeline"], arguments: list[str]) -> int:
    """A subcommand that reads recordings and needs no server."""
    try:
        if command == "eplb":
            from moesaic.launch.eplb_cli import run_eplb

            return run_eplb(arguments)
        from moesaic.launch.timeline_cli import run_timeline

        return run_timeline(arguments)
    except ConfigError as error:
        print(f"moesaic {command}: {error}", file=sys.stderr)
        return 2


def _load_server() -> Callable[[ServerConfig], int]:
    # Importing takes seconds and swallows KeyboardInterrupt in places; there is nothing to clean up yet.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from moesaic.launch.server import serve
    finally:
        signal.signal(signal.SIGINT, previous)
    return serve


if __name__ == "__main__":
    sys.exit(main())
