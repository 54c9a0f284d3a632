"""The baseline the model must beat: an interpolated Kneser-Ney 5-gram model, over bytes or over the model's tokens.

An n-gram is packed into one integer (five 12-bit tokens fit 60 bits), so counting is sorting.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ORDER = 5
DISCOUNT = 0.75
BITS = 12

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def pack(documents: Sequence[Integers]) -> Integers:
    """Every position's 5-gram, as one integer each; the last symbol is in the lowest 12 bits.

    Each document is preceded by four zeros.
    """
    packed = []
    for document in documents:
        padded = np.concatenate([np.zeros(ORDER - 1, dtype=np.int64), document])
        keys = np.zeros(len(document), dtype=np.int64)
        for offset in range(ORDER):
            keys = (keys << BITS) | padded[offset : offset + len(document)]
        packed.append(keys)
    return np.concatenate(packed)


def tail(keys: Integers, length: int) -> Integers:
    """The last `length` symbols of packed n-grams."""
    return keys & ((1 << (BITS * length)) - 1)


class CountTable:
    """The n-grams of one order with their counts, and per context the total and the number of continuations."""

    def __init__(self, grams: Integers, counts: Integers) -> None:
        self.grams, self.counts = grams, counts
        self.contexts, first = np.unique(grams >> BITS, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.num_continuations = np.diff(np.append(first, len(grams)))

    def interpolate(self, keys: Integers, lower: Floats) -> Floats:
        """The probability of each key's last symbol given the others, from the lower order's probability."""
        gram = np.minimum(np.searchsorted(self.grams, keys), len(self.grams) - 1)
        count = np.where(self.grams[gram] == keys, self.counts[gram], 0)
        context = np.minimum(np.searchsorted(self.contexts, keys >> BITS), len(self.contexts) - 1)
        known = self.contexts[context] == keys >> BITS
        total = self.totals[context]
        backoff = DISCOUNT * self.num_continuations[context] / total
        return np.where(known, np.maximum(count - DISCOUNT, 0) / total + backoff * lower, lower)


def five_gram_bits(train: Sequence[Integers], held_out: Sequence[Integers], vocab_size: int) -> float:
    """Total bits of the held-out documents under a model of the training documents.

    Symbols are 1 to 4095; 0 means before the beginning. The highest order counts occurrences, lower orders count
    distinct left neighbours; the lowest falls back to 1 / vocab_size.
    """
    keys = pack(held_out)
    grams, counts = np.unique(pack(train), return_counts=True)
    tables = [CountTable(grams, counts)]
    for length in range(ORDER - 1, 0, -1):
        grams, counts = np.unique(tail(tables[0].grams, length), return_counts=True)
        tables.insert(0, CountTable(grams, counts))
    probability = np.full(len(keys), 1 / vocab_size)
    for length, table in enumerate(tables, start=1):
        probability = table.interpolate(tail(keys, length), probability)
    return float(-np.log(probability).sum() / math.log(2))
