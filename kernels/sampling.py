"""The next token of every row of logits: the largest, or a draw (Gumbel-max) with noise hashed from seed, position and token id.

Equal values count in order of token id. A row's token depends on that row alone. Filters (top-k, top-p, min-p) and penalties are
the sampler's, in launch/engine. B rows, V token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.random_bits import gumbel_noise, row_keys

MIN_TEMPERATURE = 1e-6
"""Below it a row is greedy, as in SGLang."""
LOGITS = (*FLOATS, torch.float64)


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [B, V], V >= 1 -> (tokens int64 [B], the largest logit of each row, fp32 [B]).

    In a row that holds NaN or +inf, or nothing but -inf, the largest is not finite, whichever token is given. Raises ValueError.
    """
    if uses_triton(logits):
        from moesaic.kernels.triton import sampling as device

        return device.greedy_tokens(logits)
    return greedy_tokens_reference(logits)


def greedy_tokens_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch, on the CPU (elsewhere torch's argmax doesn't say which of equal values it takes)."""
    check_logits("greedy_tokens", logits)
    tokens = logits.argmax(dim=-1)
    return tokens, logits.gather(1, tokens[:, None])[:, 0].float()


def sample_tokens(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """A draw from softmax(logits / temperature) in every row: logits [B, V], temperature fp32 [B], seed and position int64 [B]
    -> int64 [B]. Rows with a temperature below MIN_TEMPERATURE get their largest. Raises ValueError.
    """
    if uses_triton(logits):
        from moesaic.kernels.triton import sampling as device

        return device.sample_tokens(logits, temperature, seed, position)
    return sample_tokens_reference(logits, temperature, seed, position)


def sample_tokens_reference(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The same in torch, on the CPU."""
    check_sampling(logits, temperature, seed, position)
    tokens, best = greedy_tokens_reference(logits)
    scaled = logits.float().sub(best[:, None]).div_(temperature.clamp(min=MIN_TEMPERATURE)[:, None])
    drawn = scaled.add_(gumbel_noise(row_keys(seed, position), logits.shape[1])).argmax(dim=-1)
    return torch.where(temperature < MIN_TEMPERATURE, tokens, drawn)


def check_logits(function: str, logits: Tensor) -> None:
    """What both refuse. Raises ValueError."""
    check_tensor(function, "logits", logits, shape=(None, None), dtypes=LOGITS)
    if not logits.shape[1]:
        raise ValueError(f"{function}: logits has shape {list(logits.shape)}, wanted at least one token id")


def check_sampling(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> None:
    """What `sample_tokens` refuses. Raises ValueError."""
    check_logits("sample_tokens", logits)
    rows = logits.shape[:1]
    check_tensor("sample_tokens", "temperature", temperature, shape=rows, dtypes=(torch.float32,), like=logits)
    check_tensor("sample_tokens", "seed", seed, shape=rows, dtypes=(torch.int64,), like=logits)
    check_tensor("sample_tokens", "position", position, shape=rows, dtypes=(torch.int64,), like=logits)
