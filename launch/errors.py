"""The errors a person who starts a server can cause, and the one that ends a running server.

Knows nothing of flags or processes. Each message names the value and the remedy.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """What was asked for cannot be done.

    Raised before any rank process starts; the command line prints it without a traceback.
    """


class RendezvousError(ConfigError):
    """The nodes of one server did not come together: one is missing, or was started with other flags."""


class RankFailedError(RuntimeError):
    """A rank or a node died after the start. `culprit` names it in one line."""

    def __init__(self, culprit: str) -> None:
        super().__init__(culprit)
        self.culprit = culprit
