"""`moesaic router ...`: the real sglang-router (extra `moesaic[router]`), with defaults that suit moesaic's servers.

All flags are the router's own and are passed on as they are; a default is added only where its flag is not given. Knows no server.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from moesaic.launch.errors import ConfigError

DEFAULT_PORT = 8000
_DEFAULTS = {
    "--port": str(DEFAULT_PORT),  # the router's own, 30000, is that of a server
    "--prometheus-port": "29000",
    "--worker-startup-check-interval": "1",
    "--health-check-interval-secs": "5",
}


def router_command(arguments: Sequence[str]) -> list[str]:
    """The command that runs the router. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("sglang_router") is None:
        raise ConfigError("sglang-router is not installed: pip install 'moesaic[router]'")
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = dict(_DEFAULTS)
    if "--pd-disaggregation" in given and "--policy" not in given:
        # Each side's requests go where there is most room, which takes two to compare. (cache_aware would suit prefill better, but
        # in this mode router 0.3.2 never fills its tree and places at random: sgl-project/sglang#25184.)
        for side in ("prefill", "decode"):
            several = sum(argument.partition("=")[0] == f"--{side}" for argument in arguments) > 1
            defaults[f"--{side}-policy"] = "power_of_two" if several else "round_robin"
    added = [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
    return [sys.executable, "-m", "sglang_router.launch_router", *arguments, *added]


def run_router(arguments: Sequence[str]) -> int:
    """Become the router: its signals and its exit code are those of this process. Raises ConfigError."""
    command = router_command(arguments)
    sys.stdout.flush()
    os.execv(command[0], command)
