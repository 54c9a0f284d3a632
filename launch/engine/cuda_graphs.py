"""Capturing forwards as CUDA graphs. Not run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moesaic.launch.engine.graphs import Replay

WARMUPS = 2
"""Forwards before the capture: kernels are compiled and libraries take their workspaces, which a capture may not."""


class GraphMemoryError(RuntimeError):
    """The device's memory does not hold the graphs."""


class CudaGraphs:
    """See graphs.GraphBackend. All graphs share one pool of memory; `generators`: random generators that forwards draw from."""

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        self._generators = generators
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, forward: Callable[[], Tensor]) -> Replay:
        """Raises GraphMemoryError with the remedy when memory runs out."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            self._warm_up(forward)
            # Other threads (transfers, weight movement) may call CUDA meanwhile: only this thread's calls must suit a capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = forward()
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info()
            raise GraphMemoryError(
                f"CUDA graphs do not fit into the memory that weights and KV leave ({free / 1e9:.1f} of {total / 1e9:.1f} GB are "
                "free): lower --mem-fraction-static, capture fewer or smaller ones (--cuda-graph-bs, --cuda-graph-max-bs), or use "
                f"--disable-cuda-graph. CUDA says: {error}"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _warm_up(self, forward: Callable[[], Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUPS):
                forward()
        torch.cuda.current_stream().wait_stream(self._stream)
