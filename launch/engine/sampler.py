"""Chooses the next token of every row of a batch from its logits. Runs on the logits' device; knows no request.

A row's token depends on that row alone: on its logits, parameters, seed and position, bit for bit. Never on the rows
beside it, nor on how often anything was drawn before. What makes it so:

    randomness  Gumbel-max with noise hashed from (seed, position, token id): random_bits.py
    top-p       probability mass is summed in fixed-point integers, so the cut does not depend on the order of the sum
    ties        equal logits count in order of token id, in argmax and at the cut of top-k and top-p

Order, as in SGLang: penalties, temperature, softmax, top-k, top-p, min-p. Top-k and top-p both look at the unfiltered
distribution (SGLang's "joint" filter), min-p at the ratio to the largest probability, so nothing is renormalised in
between.

B rows, V token ids, R the rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.random_bits import gumbel_noise, row_keys
from moesaic.kernels.sampling import MIN_TEMPERATURE, greedy_tokens
from moesaic.launch.engine.penalties import Penalties

_MASS_ONE = 2.0**34  # fixed-point 1: the mass of V <= 2^18 tokens stays below 2^52, exact in float64 too
_CHUNK_ELEMENTS = 1 << 24  # of [R, V]: bounds the temporaries to a few 128 MB buffers


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """How to choose the token of each row. Build it with `make`; for the next step `dataclasses.replace(batch,
    position=...)`.

    All tensors on the logits' device. [B] float32: temperature (0: greedy), top_p (1: off), min_p (0: off). [B] int64:
    top_k (-1: all), seed, position (index in the whole sequence, prompt included, of the token to choose). `plain_rows`
    and `nucleus_rows` int64: the random rows without, and with, top-k or top-p; all others are greedy. `banned`: (rows,
    token_ids) int64 pairs that cannot be chosen, such as stop ids before min_new_tokens.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seed: Tensor
    position: Tensor
    plain_rows: Tensor
    nucleus_rows: Tensor
    all_greedy: bool
    needs_min_p: bool
    penalties: Penalties | None = None
    banned: tuple[Tensor, Tensor] | None = None

    @classmethod
    def make(
        cls,
        *,
        temperature: Sequence[float],
        top_p: Sequence[float],
        top_k: Sequence[int],
        min_p: Sequence[float],
        seed: Sequence[int],
        position: Sequence[int],
        penalties: Penalties | None = None,
        banned: Sequence[tuple[int, Sequence[int]]] = (),
        device: torch.device | str = "cpu",
    ) -> SamplingBatch:
        """From one valid value per row. `banned` lists (row, token ids). A seed is any signed 64-bit integer."""
        params = list(zip(temperature, top_p, top_k, strict=True))
        random = [row for row, (t, _, k) in enumerate(params) if t >= MIN_TEMPERATURE and k != 1]
        nucleus = [row for row in random if params[row][1] < 1 or params[row][2] > 0]
        plain = sorted(set(random) - set(nucleus))
        floats = torch.tensor([temperature, top_p, min_p], dtype=torch.float32).to(device)
        ints = torch.tensor([top_k, seed, position], dtype=torch.int64).to(device)
        pairs = [(row, token_id) for row, token_ids in banned for token_id in token_ids]
        ban = torch.tensor(pairs, dtype=torch.int64).T.contiguous().to(device) if pairs else None
        return cls(
            temperature=floats[0],
            top_p=floats[1],
            min_p=floats[2],
            top_k=ints[0],
            seed=ints[1],
            position=ints[2],
            plain_rows=torch.tensor(plain, dtype=torch.int64).to(device),
            nucleus_rows=torch.tensor(nucleus, dtype=torch.int64).to(device),
            all_greedy=not random,
            needs_min_p=any(min_p[row] > 0 for row in random),
            penalties=penalties,
            banned=None if ban is None else (ban[0], ban[1]),
        )


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """The next token of each row: logits [B, V], any float dtype, not changed -> (int64 [B], bool [B]). Computed in float32.

    False: the row's logits hold NaN or +inf, or nothing but -inf, and its token is any; the model, not the request, went wrong. An
    all-greedy batch without penalties makes no copy of the logits. Waits for the device only where top-k or top-p is asked for.
    """
    scores = _penalised(logits, batch)
    tokens, largest = greedy_tokens(scores)
    best, is_finite = largest[:, None], largest.isfinite()
    num_rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for rows, has_nucleus in ((batch.plain_rows, False), (batch.nucleus_rows, True)):
        for start in range(0, len(rows), num_rows):
            chunk = rows[start : start + num_rows]
            tokens[chunk] = _sample_chunk(scores, best, batch, chunk, has_nucleus)
    return tokens, is_finite


def token_logprobs(logits: Tensor, tokens: Tensor, top_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities under the model itself (before temperature, penalties and filters), float32.

    logits [B, V] any float dtype, tokens int64 [B] -> logprob of each token [B], the `top_num` largest logprobs [B,
    top_num] in falling order, their token ids int64 [B, top_num] (of equal ones in any order).
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    top = logprobs.topk(min(top_num, logits.shape[1]), dim=-1)
    return logprobs.gather(1, tokens[:, None])[:, 0], top.values, top.indices


def _penalised(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The logits after penalties and bans: a float32 copy, or the very same tensor if there are none."""
    if batch.penalties is None and batch.banned is None:
        return logits
    scores = logits.to(torch.float32, copy=True)
    if batch.penalties is not None:
        batch.penalties.apply_(scores)
    if batch.banned is not None:
        scores[batch.banned] = -torch.inf
    return scores


def _sample_chunk(scores: Tensor, best: Tensor, batch: SamplingBatch, rows: Tensor, has_nucleus: bool) -> Tensor:
    """Random tokens int64 [R] of `rows` int64 [R]; scores [B, V], best float32 [B, 1] (each row's largest score)."""
    # Taking the largest off first keeps exp in range at any temperature, and makes the best token exactly 0. Rows without a finite
    # largest get zeros: what filters make of NaN may lie outside the row.
    best = best[rows]
    scaled = scores[rows].float().sub_(best).masked_fill_(best.isfinite().logical_not_(), 0.0).div_(batch.temperature[rows, None])
    if has_nucleus:
        _keep_nucleus_(scaled, batch.top_k[rows], batch.top_p[rows])
    if batch.needs_min_p:
        scaled.masked_fill_(scaled < batch.min_p[rows, None].log(), -torch.inf)
    noise = gumbel_noise(row_keys(batch.seed[rows], batch.position[rows]), scores.shape[1])
    return scaled.add_(noise).argmax(dim=-1)


def _mass(scaled: Tensor) -> Tensor:
    """Unnormalised probability exp(scaled) <= 1 as a fixed-point int64, whose sums are exact in any order."""
    return scaled.exp().mul_(_MASS_ONE).to(torch.int64)


def _keep_nucleus_(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Set to -inf, in place, what top-k and top-p exclude. scaled float32 [R, V], largest 0; top_k, top_p [R].

    Kept is a token that has fewer than top_k tokens, and at most top_p of the mass, before it in falling order.
    """
    vocab_size = scaled.shape[1]
    num_head = _num_head(vocab_size)
    top_k = torch.where(top_k > 0, top_k, vocab_size)
    limit = top_p.double() * _mass(scaled).sum(dim=-1).double()
    head = scaled.topk(num_head, dim=-1).values
    threshold, num_kept = _cut(head, top_k, limit)
    if vocab_size > num_head:
        beyond = ((num_kept == num_head) & (top_k > num_head)).nonzero()[:, 0]
        if len(beyond):
            ordered = scaled[beyond].sort(dim=-1, descending=True).values
            threshold[beyond], num_kept[beyond] = _cut(ordered, top_k[beyond], limit[beyond])
    above, level = scaled > threshold[:, None], scaled == threshold[:, None]
    num_level = num_kept - above.sum(dim=-1)  # of the tokens exactly at the threshold, the first so many stay
    level &= level.cumsum(dim=-1, dtype=torch.int32) <= num_level[:, None]
    scaled.masked_fill_((above | level).logical_not_(), -torch.inf)


def _num_head(vocab_size: int) -> int:
    """How many of the largest tokens to order first: most nuclei end there, at a 20th of the cost of sorting all."""
    return min(vocab_size, max(64, vocab_size // 16), 1024)


def _cut(ordered: Tensor, top_k: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nucleus ends in rows `ordered` float32 [R, n], falling: (last value kept [R], number kept int64 [R]).

    limit float64 [R]: the mass that may stand before a token that is kept.
    """
    mass = _mass(ordered)
    is_kept = (mass.cumsum(dim=-1) - mass).double() <= limit[:, None]
    num_kept = torch.minimum(is_kept.sum(dim=-1), top_k)
    return ordered.gather(1, num_kept[:, None] - 1)[:, 0], num_kept
