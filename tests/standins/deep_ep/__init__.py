"""A stand-in for DeepEP on CPU, for tests: the API of both its generations over gloo, strict where the real one fails or corrupts.

It follows what DeepEP 2.1.0 documents and checks (github.com/deepseek-ai/DeepEP): names, shapes, dtypes, handles, the order of
calls, error texts. What arrives later on a GPU arrives later here too: until its hook is called or its event waited for, a result
holds poison. Not here: caches (`dispatch(handle=...)`), `num_worst_tokens`, expanded rows, RDMA between nodes, Engram, PP, AGRS.
"""

import torch

from .config import Config
from .elastic import ElasticBuffer, EPHandle
from .event import EventHandle, EventOverlap
from .legacy import Buffer

topk_idx_t = torch.int64
__version__ = "2.1.0"
__all__ = ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t"]
