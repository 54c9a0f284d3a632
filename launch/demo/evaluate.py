"""Held-out figures: bits per byte, acceptance of the MTP layer's drafts, expert load and how it differs by domain.

Bits per byte divides all bits the model needs for the held-out code and prose (end-of-text tokens included, chat
excluded: its text repeats the code's) by the UTF-8 bytes of that text.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.launch.demo.data import Tokens
from moesaic.launch.demo.experts import Routing
from moesaic.launch.demo.model import DemoModel

WINDOW, STRIDE = 1024, 512
"""Documents are scored in windows; a token deep in a document has at least STRIDE tokens of context."""
BATCH_WINDOWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """What scoring documents gives. `counts` is [sparse layers, experts]: tokens of the main model's sparse layers."""

    bits: float
    num_tokens: int
    counts: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How often the MTP layer's first draft is right.

    `greedy`: against the main model's own greedy continuation of held-out prompts. `teacher_forced`: against the main
    model's greedy choice along held-out text.
    """

    greedy: float
    teacher_forced: float
    num_greedy: int
    num_teacher_forced: int


def windows_of(documents: Sequence[Tokens]) -> Iterator[tuple[Tokens, int]]:
    """(tokens, first scored position) of overlapping windows that score every token but <|bos|> exactly once."""
    for document in documents:
        done = 1
        for start in range(0, max(1, len(document) - WINDOW + STRIDE), STRIDE):
            window = document[start : start + WINDOW]
            if start + len(window) > done:
                yield window, done - start
                done = start + len(window)


@torch.inference_mode()
def score(model: DemoModel, documents: Sequence[Tokens]) -> TextScore:
    """Bits of `documents` (each <|bos|> ... <|eos|>), and where their tokens were routed."""
    config = model.config
    bits, num_tokens = 0.0, 0
    counts = torch.zeros(len(config.sparse_layer_ids), config.n_routed_experts, dtype=torch.int64)
    windows = sorted(windows_of(documents), key=lambda w: len(w[0]))
    for start in range(0, len(windows), BATCH_WINDOWS):
        batch = windows[start : start + BATCH_WINDOWS]
        length = len(batch[-1][0])
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        scored = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, (window, first) in enumerate(batch):
            ids[row, : len(window)] = torch.from_numpy(window.astype(np.int64))
            scored[row, first : len(window)] = True
        routing = Routing()
        hidden = model(ids, routing)
        mask = scored[:, 1:]
        logits = functional.linear(hidden[:, :-1][mask], model.head()).float()
        bits += functional.cross_entropy(logits, ids[:, 1:][mask], reduction="sum").item() / math.log(2)
        num_tokens += int(mask.sum())
        counts += count_experts(routing, scored.flatten(), config.n_routed_experts)
    return TextScore(bits=bits, num_tokens=num_tokens, counts=counts)


def count_experts(routing: Routing, mask: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert where `mask` [T] holds: [sparse layers, experts] int64."""
    return torch.stack([ids[mask].flatten().bincount(minlength=num_experts) for ids in routing.topk_ids])


def max_violation(counts: Tensor) -> Tensor:
    """max / mean - 1 per layer. counts [layers, experts] -> [layers]."""
    load = counts.float()
    return load.amax(-1) / load.mean(-1) - 1


def prompts_from(documents: Sequence[Tokens], number: int, length: int) -> Tensor:
    """Evenly spread stretches of text, each begun with <|bos|>: [number, length] int64."""
    long = [d for d in documents if len(d) > 2 * length]
    joined = np.concatenate([d[1:-1] for d in long])
    starts = np.linspace(0, len(joined) - length, number).astype(np.int64)
    bos = documents[0][0]
    rows = [np.concatenate([[bos], joined[s : s + length - 1]]) for s in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.inference_mode()
def greedy(model: DemoModel, prompts: Tensor, num_new: int) -> Tensor:
    """prompts [B, P] -> [B, P + num_new]; recomputes everything at each step."""
    ids = prompts
    for _ in range(num_new):
        ids = torch.cat((ids, functional.linear(model(ids)[:, -1], model.head()).float().argmax(-1, keepdim=True)), 1)
    return ids


@torch.inference_mode()
def acceptance(
    model: DemoModel, documents: Sequence[Tokens], eos_id: int, *, number: int = 64, length: int = 96, num_new: int = 64
) -> Acceptance:
    """Acceptance of the first draft over `number` prompts of `length` tokens, continued by `num_new` tokens.

    Attention is causal, so one pass over the finished continuation gives the drafts that were made along the way.
    """
    prompts = prompts_from(documents, number, length)
    ids = greedy(model, prompts, num_new)
    hidden = model(ids)
    drafts = functional.linear(model.draft(ids[:, 1:], hidden[:, :-1]), model.head()).argmax(-1)
    choices = functional.linear(hidden, model.head()).argmax(-1)
    agree = drafts == choices[:, 1:]
    forced = agree[:, : length - 1]
    ended = (ids[:, length:] == eos_id).cumsum(1) > 0
    continued = agree[:, length - 1 :][~ended]
    return Acceptance(
        greedy=continued.float().mean().item(),
        teacher_forced=forced.float().mean().item(),
        num_greedy=continued.numel(),
        num_teacher_forced=forced.numel(),
    )
