"""ARCHITECTURE.md has a line for every file of code, and none for a file that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "attention", "moe", "eplb", "overlap", "launch")


def test_every_file_of_code_has_a_line() -> None:
    listed = set()
    for section in re.split(r"^### ", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        folder = section.splitlines()[0].strip()
        listed |= {folder + name for name in re.findall(r"^\| `([^`]+)` \| \S", section, flags=re.MULTILINE)}
    found = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for pattern in ("*.py", "*.c", "*.h")
        for path in (ROOT / folder).rglob(pattern)
        if path.name != "__init__.py"
    }

    assert listed == found
