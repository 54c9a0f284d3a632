"""The demo model: a small DeepSeek-V3 trained from text that is on every machine (Python's standard library).

`python -m moesaic.launch.demo.train` runs the whole pipeline. Nothing here imports the serving engine: the model is
written a second time, for training, so that the served model has something independent to agree with.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"
DEFAULT_WORK_DIR = Path.home() / ".cache" / "moesaic" / "demo_run"
"""Where a training run keeps its snapshots."""
