"""config.json of the released DeepSeek-V3, as the benchmarks have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEEPSEEK_V3: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "deepseek_v3.json").read_text(encoding="utf-8")
)
