"""Tokens through prefill and decode equal the oracle's, for any two layouts, every transport, and every way KV gets to decode.

The whole product runs with `-m whole`; by default one of it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
from engine_jobs import EngineSettings, merged
from pd_jobs import PdSettings, Served, pd_job, pd_wave
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.launch.disaggregation.backends import BackendName, missing_reason
from moesaic.launch.disaggregation.bootstrap import BootstrapServer

LAYOUTS = {
    "tp1": {"tp": 1, "dp": 1},
    "dp2-ep2": {"tp": 2, "dp": 2},
    "dp4-ep4": {"tp": 4, "dp": 4},
    "attention-tp2": {"tp": 2, "dp": 1},
}
WAYS = ("streaming", "chunked", "prefix hit on prefill", "prefix kept on decode")
PROMPTS = [[9, 8, 7, 6, 5], list(range(40, 73)), [3] * 20, list(range(100, 161)), [*range(40, 73), 7, 8]]
NUM_TOKENS, PAGE_SIZE = 6, 4
SECOND_WAVE = 8
"""The first request of the second wave."""


class Case(NamedTuple):
    """Layouts of both sides, the transport, and how KV gets to decode."""

    prefill: str
    decode: str
    backend: BackendName
    way: str

    def settings(self, layout: str, mode: str, *, prefix_cache: bool) -> dict[str, object]:
        """The engine of one side."""
        sizes = LAYOUTS[layout]
        a2a = "none" if sizes["tp"] == 1 else "torch"
        chunk = 7 if self.way == "chunked" else 128
        return {**sizes, "a2a": a2a, "mode": mode, "chunk_tokens": chunk, "prefix_cache": prefix_cache, "page_size": PAGE_SIZE}

    def num_fetched(self, prompt: list[int]) -> int:
        """The pages of a prompt that decode lacks when it comes for the second time."""
        kept = len(prompt) // PAGE_SIZE if self.way == "prefix kept on decode" else 0
        return -(-len(prompt) // PAGE_SIZE) - kept


CASES = [Case(*values) for values in product(("tp1", "dp2-ep2"), LAYOUTS, ("tcp", "nixl", "mooncake"), WAYS)]
CASES += [Case("tp1", "tp1", "fake", way) for way in WAYS]


@cache
def expected(model: TinyModel) -> list[list[int]]:
    return [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


def serve(model: TinyModel, pool: RankPool, case: Case) -> list[tuple[Served, Served]]:
    """The prompts twice, the second time when all have been served. Per worker what its ranks of both sides sent."""
    folder = str(model.folder)
    prefill = case.settings(case.prefill, "normal", prefix_cache=case.way == "prefix hit on prefill")
    decode = case.settings(case.decode, "low_latency", prefix_cache=case.way == "prefix kept on decode")
    with BootstrapServer(port=0) as server:
        port = server.address[1]
        pd = PdSettings(
            prefill=EngineSettings(model_path=folder, **prefill),  # type: ignore[arg-type]
            decode=EngineSettings(model_path=folder, **decode),  # type: ignore[arg-type]
            backend=case.backend,
            port=port,
            prefill_first=0 if case.backend == "fake" else 2,  # the fake one reads within a process
        )
        waves = [pd_wave(PROMPTS, NUM_TOKENS, first_room, port) for first_room in (0, SECOND_WAVE)]
        results: list[tuple[Served, Served]] = pool.run(pd.num_workers, pd_job, pd, waves)
    return results


def check(model: TinyModel, pool: RankPool, case: Case) -> None:
    results = serve(model, pool, case)
    prefilled, decoded = (merged([both[side].finished for both in results]) for side in (0, 1))
    for place, tokens in enumerate(expected(model)):
        for rid in (place, SECOND_WAVE + place):
            assert (decoded[rid].tokens, decoded[rid].finish_reason) == (tokens, "length"), f"prompt {place}, request {rid}"
            assert (prefilled[rid].tokens, prefilled[rid].finish_reason) == ([], "length")
    sizes = LAYOUTS[case.decode]
    for rank, (_, served) in enumerate(results[: sizes["tp"]]):
        own = PROMPTS[rank * sizes["dp"] // sizes["tp"] :: sizes["dp"]]
        assert served.pages[1] == sum(map(case.num_fetched, own)), "each page that is lacking is fetched once"
    if case.way == "streaming":
        counts = [count for _, served in results for count in served.num_outputs.values()]
        assert set(counts) == {NUM_TOKENS}, "every token goes out by itself"
    if case.way == "prefix hit on prefill":
        assert all(prefilled[SECOND_WAVE + place].cached_tokens for place in range(len(PROMPTS)))


def marked(case: Case) -> object:
    reason = missing_reason(case.backend)
    return pytest.param(case, id=" ".join(case), marks=pytest.mark.skipif(reason is not None, reason=f"{case.backend}: {reason}"))


def test_two_ranks_prefill_for_four(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    check(tiny("plain"), rank_pool, Case("dp2-ep2", "dp4-ep4", "tcp", "chunked"))


@pytest.mark.whole
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_tokens_equal_the_oracle_in_the_whole_product(case: Case, tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    check(tiny("plain"), rank_pool, case)
