"""Random numbers that are a pure function of (seed, position, token id): no generator, no state, no order.

So a request draws the same tokens in any batch, on any rank, after a restart or a retraction. Everything is int32 or
int64 tensor arithmetic, which wraps the same way on every device. Two steps, because the second runs on [B, V]
elements:

    row key   splitmix64 (Steele et al. 2014) of seed and position, int64 [B]
    bits      two rounds of a 32-bit mix (constants of Wellons' lowbias32 and of murmur3's finaliser) over token id and
              both halves of the key, int32 [B, V]; 4x cheaper on a CPU than 64-bit mixing

SGLang's sampler hashes the same three things (`multinomial_with_seed`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(constant: int, bits: int) -> int:
    """The same bits as a signed integer, as torch wants its scalars."""
    return constant - (1 << bits) if constant >> (bits - 1) else constant


_GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
_MIX_64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
_GOLDEN_32 = _signed(0x9E3779B9, 32)
_MIX_32 = tuple(_signed(constant, 32) for constant in (0x21F0AAAD, 0xD35A2D97, 0x85EBCA6B, 0xC2B2AE35))


def _xor_shift(bits: Tensor, shift: int) -> Tensor:
    """bits ^= bits >>> shift, in place. torch's >> copies the sign, so the shifted-in bits are masked off."""
    width = bits.element_size() * 8
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (width - shift)) - 1))


def _splitmix64(state: Tensor) -> Tensor:
    """One step of splitmix64: int64 -> int64, a bijection."""
    bits = state + _GOLDEN_64
    _xor_shift(bits, 30).mul_(_MIX_64[0])
    _xor_shift(bits, 27).mul_(_MIX_64[1])
    return _xor_shift(bits, 31)


def row_keys(seed: Tensor, position: Tensor) -> Tensor:
    """The random key of each row: seed int64 [B] (any value), position int64 [B] -> int64 [B]."""
    return _splitmix64(_splitmix64(seed) + position)


def random_bits(keys: Tensor, num_tokens: int) -> Tensor:
    """32 random bits for every token id in [0, num_tokens): keys int64 [B] -> int32 [B, num_tokens]."""
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # the cast keeps the low 32 bits
    bits = torch.arange(num_tokens, dtype=torch.int32, device=keys.device) * _GOLDEN_32 + low[:, None]
    _xor_shift(bits, 16).mul_(_MIX_32[0])
    _xor_shift(bits, 15).mul_(_MIX_32[1])
    bits.bitwise_xor_(high[:, None])
    _xor_shift(bits, 15).mul_(_MIX_32[2])
    _xor_shift(bits, 13).mul_(_MIX_32[3])
    return _xor_shift(bits, 16)


def gumbel_noise(keys: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise for the Gumbel-max trick: keys int64 [B] -> float32 [B, num_tokens], all finite.

    argmax(log p + noise) is a draw from p. Noise = -log(-log(1 - u)), u in (0, 1): written with log1p, the large noises
    (the ones that win) come from small u, where float32 is fine-grained; the largest is 22, from u = 2^-32.
    """
    uniform = random_bits(keys, num_tokens).bitwise_and_(0x7FFFFFFF).to(torch.float32)
    uniform.mul_(2.0**-31).add_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
