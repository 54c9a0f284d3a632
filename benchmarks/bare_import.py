"""Makes `moesaic` importable from this repository where it isn't installed: a bare GPU box has torch, triton and numpy only."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("moesaic") is None:
    package = types.ModuleType("moesaic")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["moesaic"] = package
