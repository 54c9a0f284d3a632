"""All figures of the model card, measured on the held-out part of the corpus."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moesaic.launch.demo.baseline import Integers, five_gram_bits
from moesaic.launch.demo.corpus import Corpus, Document
from moesaic.launch.demo.data import encode
from moesaic.launch.demo.evaluate import TextScore, acceptance, max_violation, score
from moesaic.launch.demo.model import DemoModel
from moesaic.launch.demo.restore import load_model
from moesaic.launch.demo.tokenizer import EOS_ID

DOMAINS = ("code", "prose")
SLICE = "textwrap.py"
"""A held-out file whose own figure is stored too, so that a test can check the checkpoint in a second."""


def num_bytes(documents: Sequence[Document]) -> int:
    """UTF-8 bytes of the texts."""
    return sum(len(d.text.encode()) for d in documents)


def of_domains(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The documents that figures are measured on, by domain."""
    return {domain: [d for d in documents if d.kind == domain] for domain in DOMAINS}


def measure(trained: DemoModel, checkpoint: Path, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Any]:
    """`trained` is the model before quantisation; the routing and acceptance figures are the checkpoint's.

    Bits per byte come as {all, code, prose} for bf16 and FP8 weights; both compute in bfloat16.
    """
    held_out = of_domains(corpus.held_out)
    sizes = {domain: num_bytes(documents) for domain, documents in held_out.items()}
    tokens = {domain: encode(tokenizer, documents) for domain, documents in held_out.items()}
    quantized = load_model(checkpoint)
    scores = {domain: score(quantized, tokens[domain]) for domain in DOMAINS}
    unquantized = {domain: score(rounded(trained), tokens[domain]) for domain in DOMAINS}
    sliced = [d for d in held_out["code"] if d.origin == SLICE]
    drafts = acceptance(quantized, tokens["code"] + tokens["prose"], EOS_ID)
    return {
        "held_out_bytes": sizes,
        "bits_per_byte_fp8": bits_per_byte(scores, sizes),
        "bits_per_byte_bf16": bits_per_byte(unquantized, sizes),
        "bits_per_byte_slice": score(quantized, encode(tokenizer, sliced)).bits / num_bytes(sliced),
        "bits_per_byte_5gram_tokens": five_gram(corpus, sizes, tokenizer),
        "bits_per_byte_5gram_bytes": five_gram(corpus, sizes, None),
        "mtp": dataclasses.asdict(drafts),
        "load": load_figures({domain: s.counts for domain, s in scores.items()}),
    }


def rounded(model: DemoModel) -> DemoModel:
    """A copy whose weights are what bfloat16 storage would keep."""
    copy = DemoModel(model.config)
    copy.load_state_dict({n: t if "correction_bias" in n else t.to(torch.bfloat16).float() for n, t in model.state_dict().items()})
    return copy.eval()


def bits_per_byte(scores: dict[str, TextScore], sizes: dict[str, int]) -> dict[str, float]:
    """Per domain and over all held-out text."""
    result = {domain: scores[domain].bits / sizes[domain] for domain in scores}
    return {"all": sum(s.bits for s in scores.values()) / sum(sizes.values()), **result}


def five_gram(corpus: Corpus, sizes: dict[str, int], tokenizer: Tokenizer | None) -> dict[str, float]:
    """The baseline's bits per byte, over tokens or (without a tokenizer) over bytes; both predict ends of documents."""

    def symbols(documents: Sequence[Document]) -> list[Integers]:
        if tokenizer is not None:  # <|bos|> is id 0
            return [d[1:].astype(np.int64) for d in encode(tokenizer, documents)]
        return [np.frombuffer(d.text.encode() + b"\0", dtype=np.uint8).astype(np.int64) + 1 for d in documents]

    vocab_size = 256 if tokenizer is None else tokenizer.get_vocab_size()
    train = symbols(corpus.train)
    held_out = of_domains(corpus.held_out)
    bits = {domain: five_gram_bits(train, symbols(held_out[domain]), vocab_size) for domain in DOMAINS}
    result = {domain: bits[domain] / sizes[domain] for domain in DOMAINS}
    return {"all": sum(bits.values()) / sum(sizes.values()), **result}


def load_figures(counts: dict[str, Tensor]) -> dict[str, Any]:
    """counts: domain -> [sparse layers, experts]. Maximum violation per layer and what differs between the domains.

    `overlap` is the share of load that both domains put on the same experts (1: no skew); `ratio` the largest quotient
    of an expert's shares in the two domains; `code_experts` and `prose_experts` those with the largest surplus.
    """
    code, prose = (counts[domain].float() / counts[domain].sum(-1, keepdim=True) for domain in DOMAINS)
    surplus = code - prose
    ratio = torch.maximum(code, prose) / torch.minimum(code, prose).clamp_min(1e-6)
    return {
        "violation": max_violation(counts["code"] + counts["prose"]).tolist(),
        "violation_code": max_violation(counts["code"]).tolist(),
        "violation_prose": max_violation(counts["prose"]).tolist(),
        "overlap": torch.minimum(code, prose).sum(-1).tolist(),
        "ratio": ratio.amax(-1).tolist(),
        "code_experts": surplus.topk(3, -1)[1].tolist(),
        "prose_experts": (-surplus).topk(3, -1)[1].tolist(),
    }
