"""What a rank process runs: the engine, and on an instance with a role its rooms. Called by rank_main.py."""

from __future__ import annotations

from moesaic.launch.engine.rank_process import run_rank
from moesaic.launch.engine.rank_spec import RankSpec


def run(spec: RankSpec) -> None:
    """Returns after a clean stop, exits with status 1 after an error."""
    if spec.role is None:
        run_rank(spec)
        return
    from moesaic.launch.disaggregation.attach import attach_rooms

    run_rank(spec, attach_rooms)
