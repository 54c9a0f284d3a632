"""`moesaic deploy-files DIR`: copies the Slurm scripts, Kubernetes manifests and their README to a folder, to be adapted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesaic.launch.args import new_parser
from moesaic.launch.errors import ConfigError

DEPLOY_DIR = Path(__file__).parent / "deploy"


def run_deploy_files(argv: Sequence[str]) -> int:
    """The arguments after `deploy-files`. Raises ConfigError rather than write over a file that has been adapted."""
    parser = new_parser("moesaic deploy-files", "Copy Slurm scripts and Kubernetes manifests to a folder, to be adapted.")
    parser.add_argument("folder", metavar="DIR")
    folder = Path(parser.parse_args(argv).folder)
    sources = sorted(DEPLOY_DIR.iterdir())
    there = [source.name for source in sources if (folder / source.name).exists()]
    if there:
        raise ConfigError(f"{folder} holds {', '.join(there)} already; choose another folder, or move these away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            (folder / source.name).write_bytes(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror or error}") from None
    print(f"wrote {', '.join(source.name for source in sources)} to {folder}; README.md there says how to go on")
    return 0
