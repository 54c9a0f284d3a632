"""Token windows for training: documents in a new order every epoch, joined, cut, and shuffled. All from one seed.

A window of length L holds L + 2 tokens: the model reads the first L, predicts the L that follow by one, and its MTP
layer the L that follow by two. The same epoch, seed and length give the same windows, so a run is resumed by its step
number alone.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from moesaic.launch.demo.corpus import Document
from moesaic.launch.demo.tokenizer import BOS_ID, EOS_ID

Tokens = npt.NDArray[np.uint16]


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[Tokens]:
    """One array per document: <|bos|>, its tokens, <|eos|>."""
    encodings = tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    return [np.array([BOS_ID, *e.ids, EOS_ID], dtype=np.uint16) for e in encodings]


class WindowStream:
    """An endless, addressable sequence of windows over `documents`."""

    def __init__(self, documents: Sequence[Tokens], seed: int) -> None:
        self.documents = documents
        self.seed = seed
        self.num_tokens = sum(len(d) for d in documents)
        self._cached: tuple[tuple[int, int], Tokens] | None = None

    def _epoch(self, epoch: int, length: int) -> Tokens:
        """All windows of one epoch, shuffled: [number, length + 2]."""
        if self._cached is None or self._cached[0] != (epoch, length):
            rng = np.random.default_rng([self.seed, epoch])
            joined = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
            starts = rng.permutation(np.arange(0, len(joined) - length - 1, length))
            windows = np.lib.stride_tricks.sliding_window_view(joined, length + 2)[starts]
            self._cached = ((epoch, length), windows)
        return self._cached[1]

    def batch(self, first_token: int, num_tokens: int, length: int) -> torch.Tensor:
        """The windows at position `first_token` of the run: [num_tokens // length, length + 2] int64."""
        rows = []
        for index in range(first_token // length, (first_token + num_tokens) // length):
            per_epoch = (self.num_tokens - 2) // length
            rows.append(self._epoch(index // per_epoch, length)[index % per_epoch])
        return torch.from_numpy(np.stack(rows).astype(np.int64))
