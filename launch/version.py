"""The version that is installed."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """moesaic's version as the package metadata has it."""
    try:
        return importlib.metadata.version("moesaic")
    except importlib.metadata.PackageNotFoundError:
        return "0+not.installed"
