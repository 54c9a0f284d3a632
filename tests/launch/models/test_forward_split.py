"""A step's two micro-batches are forwards of their own: the first's, then the second's logits are the whole step's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from joined_halves import join_row_ids
from tiny_models import TinyModel
from torch import Tensor

from moesaic.attention.backend import KernelBackend
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, ExtendSequence, decode_buckets
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.forward import ForwardInput
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.weights import CheckpointWeights
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan

Tiny = Callable[..., TinyModel]
PAGE, PAGES_PER_SEQUENCE, CPU = 4, 8, torch.device("cpu")


@dataclass(frozen=True)
class Span:
    """New tokens [start, stop) of a sequence."""

    tokens: list[int]
    start: int
    stop: int


def _tokens(length: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(2, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


SEQUENCES = [_tokens(length, seed) for seed, length in enumerate((12, 9, 30, 17))]
DECODE = [Span(SEQUENCES[0], 11, 12), Span(SEQUENCES[1], 8, 9)]
CHUNKS = [Span(SEQUENCES[2], 10, 30), Span(SEQUENCES[3], 0, 17)]
STEPS = {"decode": (DECODE, []), "chunk on a prefix": ([], CHUNKS[:1]), "mixed": (DECODE, CHUNKS)}


class Driver:
    """A model on one rank. Sequence i of a step has pages of its own."""

    def __init__(self, tiny_model: TinyModel, mode: DispatchMode) -> None:
        config = load_model_config(tiny_model.folder)
        builder = DeepseekV3Builder(
            config,
            CheckpointWeights(tiny_model.folder),
            ParallelContext(a2a_backend="torch"),
            KernelBackend(),
            BuildOptions(max_positions=config.max_position_embeddings),
        )
        self.model = builder.build()
        self.pool = LatentKVPool(
            num_layers=config.num_hidden_layers,
            num_pages=len(SEQUENCES) * PAGES_PER_SEQUENCE,
            page_size=PAGE,
            latent_dim=config.latent_dim,
            dtype=torch.float32,
            device=CPU,
        )
        self._mode = mode
        self._pages = torch.randperm(self.pool.num_pages, generator=torch.Generator().manual_seed(0)).view(-1, PAGES_PER_SEQUENCE)

    def fill_prefixes(self, decode: list[Span], chunks: list[Span]) -> None:
        """Write the KV of all tokens before the step's own."""
        for place, span in enumerate([*decode, *chunks]):
            if span.start:
                self.model.forward(self._inputs([], [Span(span.tokens, 0, span.start)], [], first_place=place), self.pool)

    def step(self, decode: list[Span], chunks: list[Span], logit_rows: list[int]) -> ForwardInput:
        return self._inputs(decode, chunks, logit_rows, first_place=0)

    def halves(self, inputs: ForwardInput, cut: int) -> tuple[ForwardInput, ForwardInput]:
        """As a single rank's headers would have it."""
        counts = (cut, len(inputs.input_ids) - cut)
        first, second = (DispatchPlan(mode=self._mode, num_tokens_per_rank=(count,)) for count in counts)
        num_first = int((inputs.logit_rows < cut).sum())
        return inputs.split(cut, (first, second), ((num_first,), (len(inputs.logit_rows) - num_first,)))

    def _inputs(self, decode: list[Span], chunks: list[Span], logit_rows: list[int], first_place: int) -> ForwardInput:
        spans = list(enumerate([*decode, *chunks], first_place))
        extends, row = [], len(decode)
        for place, span in spans[len(decode) :]:
            length = span.stop - span.start
            pages = self._pages[place, : -(-span.stop // PAGE)]
            extends.append(ExtendSequence(start=row, length=length, prefix_len=span.start, pages=pages))
            row += length
        table = self._pages[: len(decode)].numpy().astype(np.int32)
        metadata = AttentionMetadata(
            positions=torch.cat([torch.arange(span.start, span.stop) for _, span in spans]),
            slots=torch.cat([self._slots(place, span) for place, span in spans]),
            num_decode=len(decode),
            buckets=decode_buckets(table, np.array([span.stop for span in decode], dtype=np.int64), PAGE, CPU),
            extends=tuple(extends),
        )
        return ForwardInput(
            input_ids=torch.tensor([token for _, span in spans for token in span.tokens[span.start : span.stop]]),
            metadata=metadata,
            plan=DispatchPlan(mode=self._mode, num_tokens_per_rank=(row,)),
            logit_rows=torch.tensor(logit_rows, dtype=torch.long),
            num_logits_per_dp_rank=(len(logit_rows),),
        )

    def _slots(self, place: int, span: Span) -> Tensor:
        positions = torch.arange(span.start, span.stop)
        return self._pages[place][positions // PAGE] * PAGE + positions % PAGE


@pytest.mark.parametrize("mode", DispatchMode)
@pytest.mark.parametrize("step", STEPS)
def test_first_then_second_half_give_the_wholes_logits_in_its_order(tiny: Tiny, step: str, mode: DispatchMode) -> None:
    """At cuts everywhere, empty sides too, with logit rows out of order as prompt logprobs make them."""
    decode, chunks = STEPS[step]
    whole, parted = Driver(tiny("plain"), mode), Driver(tiny("plain"), mode)
    num_rows = len(decode) + sum(span.stop - span.start for span in chunks)
    logit_rows = [*range(0, num_rows, 2), *range(1, num_rows, 3)]
    whole.fill_prefixes(decode, chunks)
    expected = whole.model.forward(whole.step(decode, chunks, logit_rows), whole.pool)
    for cut in sorted({0, 1, 2, num_rows // 2, num_rows - 1, num_rows}):
        parted.pool.pages(0).zero_()
        parted.fill_prefixes(decode, chunks)
        inputs = parted.step(decode, chunks, logit_rows)
        logits = [parted.model.forward(half, parted.pool) for half in parted.halves(inputs, cut)]
        torch.testing.assert_close(join_row_ids(logits[0], logits[1], inputs.logit_rows, cut), expected, rtol=0, atol=1e-4)


def test_the_logits_are_the_oracles(tiny: Tiny) -> None:
    """Guards the test above against an error that halves and whole share."""
    model = tiny("plain")
    driver = Driver(model, DispatchMode.NORMAL)
    driver.fill_prefixes(DECODE, CHUNKS)
    inputs = driver.step(DECODE, CHUNKS, [0, 1, 21, 38])
    first, second = driver.halves(inputs, 19)
    halves = [driver.model.forward(half, driver.pool) for half in (first, second)]
    logits = join_row_ids(halves[0], halves[1], inputs.logit_rows, 19)
    expected = torch.stack([model.logits(sequence)[-1] for sequence in SEQUENCES])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_each_half_carries_what_the_ranks_agreed_on_for_it(tiny: Tiny) -> None:
    inputs = Driver(tiny("plain"), DispatchMode.NORMAL).step(DECODE, CHUNKS, [0, 1, 21, 38, 5])
    plans = tuple(DispatchPlan(mode=DispatchMode.NORMAL, num_tokens_per_rank=counts) for counts in ((19, 3), (20, 4)))
    first, second = inputs.split(19, (plans[0], plans[1]), ((3, 1), (2, 2)))
    assert (first.plan, second.plan) == plans
    assert (first.num_logits_per_dp_rank, second.num_logits_per_dp_rank) == ((3, 1), (2, 2))
    assert (first.logit_rows.tolist(), second.logit_rows.tolist()) == ([0, 1, 5], [2, 19])
    assert torch.equal(torch.cat([first.input_ids, second.input_ids]), inputs.input_ids)
    with pytest.raises(ValueError, match="cut 40 of ForwardInput lies outside its 39 rows"):
        inputs.split(40, (plans[0], plans[1]), ((3, 1), (2, 2)))
