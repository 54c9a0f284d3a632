"""`python -m moesaic.launch.demo.traces`: records where the demo model routes real text, as input for the balancer.

One file per domain, in the load recorder's format (numpy .npz):

    logical_count   int32 [num_windows, num_sparse_layers, num_experts]: tokens that chose each logical expert
    layer_ids       int32 [num_sparse_layers]: the main model's sparse layers
    num_tokens      int32 [num_windows]: tokens of each window
    window_tokens   int32: the intended size of a window
    model, domain   strings

A window is consecutive text in the corpus's order (topics by name, files by path), held-out text included.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.demo.corpus import load_corpus
from moesaic.launch.demo.data import Tokens, encode
from moesaic.launch.demo.environment import tune_process
from moesaic.launch.demo.evaluate import count_experts
from moesaic.launch.demo.experts import Routing
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.restore import load_model

WINDOW_TOKENS = 1024
NUM_WINDOWS = 480
TRACES_DIR = Path(__file__).parents[2] / "benchmarks" / "traces"
BATCH_WINDOWS = 8


@torch.inference_mode()
def record(model: DemoModel, documents: Sequence[Tokens], num_windows: int = NUM_WINDOWS) -> dict[str, npt.NDArray[np.int32]]:
    """The numeric arrays of a trace over the first `num_windows` windows of the joined documents."""
    joined = np.concatenate(list(documents))
    num_windows = min(num_windows, len(joined) // WINDOW_TOKENS)
    windows = torch.from_numpy(joined[: num_windows * WINDOW_TOKENS].astype(np.int64)).view(num_windows, -1)
    counts = []
    for batch in torch.split(windows, BATCH_WINDOWS):
        routing = Routing()
        model(batch, routing)
        for row in range(len(batch)):
            mask = torch.zeros(batch.shape, dtype=torch.bool)
            mask[row] = True
            counts.append(count_experts(routing, mask.flatten(), model.config.n_routed_experts))
    return {
        "logical_count": torch.stack(counts).numpy().astype(np.int32),
        "layer_ids": np.array(model.config.sparse_layer_ids, dtype=np.int32),
        "num_tokens": np.full(num_windows, WINDOW_TOKENS, dtype=np.int32),
        "window_tokens": np.array(WINDOW_TOKENS, dtype=np.int32),
    }


def main() -> None:
    """Writes code.npz and prose.npz."""
    tune_process("moesaic.launch.demo.traces")
    parser = argparse.ArgumentParser(description="Record expert loads of the demo model on code and on prose.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT_DIR)
    parser.add_argument("--output", type=Path, default=TRACES_DIR)
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint)
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    corpus = load_corpus()
    for domain in ("code", "prose"):
        texts = [d for d in corpus.documents if d.kind == domain]
        arrays = record(model, encode(tokenizer, texts))
        path = arguments.output / f"{domain}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, model=np.array("moesaic-demo"), domain=np.array(domain), **arrays)  # type: ignore[arg-type]
        print(f"{path}: {arrays['logical_count'].shape}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
