"""Puts the DeepEP stand-in (tests/standins) where `import deep_ep` finds it, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

STANDINS = str(Path(__file__).parents[1] / "standins")


def install() -> None:
    if STANDINS not in sys.path:
        sys.path.insert(0, STANDINS)
