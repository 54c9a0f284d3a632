"""Whole decode servers short of memory, in several layouts: what is retracted loses nothing, whether its KV is kept or not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_server import wait_for
from live_server import LiveServer
from pd_servers import PdPair, greedy, metric, next_room, pd_pair
from tiny_models import TinyModel

TORCH_EP = ("--moe-a2a-backend", "torch")
LAYOUTS = {
    "dp2 ep2": ("--tp", "2", "--dp", "2", "--enable-dp-attention", *TORCH_EP),
    "attention tp2": ("--tp", "2", *TORCH_EP),
}
PROMPTS = [[index + 5, *range(50, 90)] for index in range(16)]
NUM_TOKENS = 40


def stream_and_leave(pair: PdPair, prompt: list[int]) -> None:
    """Read a few tokens of the answer, then hang up on both servers."""
    body = {**greedy(prompt, NUM_TOKENS), **pair.room(), "stream": True}

    def read(server: LiveServer, num_lines: int) -> None:
        with server.client() as client, client.stream("POST", "/generate", json=body) as answer:
            for _, _ in zip(answer.iter_lines(), range(num_lines), strict=False):
                pass

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, (pair.prefill, pair.decode), (1, 20)))


@pytest.mark.whole
@pytest.mark.parametrize("host_kv_gb", ["0", "0.00003", "1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_retraction_loses_nothing(layout: str, host_kv_gb: str, model: TinyModel, tmp_path: Path) -> None:
    """No host memory, room for three pages, less than most need, room for all. Some clients leave in the middle."""
    short = ("--max-total-tokens", "256", "--num-reserved-decode-tokens", "8", "--disaggregation-host-kv-gb", host_kv_gb)
    with pd_pair(model.folder, tmp_path, ("--chunked-prefill-size", "64"), (*LAYOUTS[layout], *short)) as pair:
        with ThreadPoolExecutor(5) as threads:
            leaving = [threads.submit(stream_and_leave, pair, [9, *PROMPTS[index]]) for index in range(4)]
            batch = {**greedy(PROMPTS[0], NUM_TOKENS), "input_ids": PROMPTS, **pair.room([next_room() for _ in PROMPTS])}
            answers = threads.submit(pair.both, "/generate", batch).result()[1].json()
            for one in leaving:
                one.result()
        wait_for(lambda: pair.used_tokens() == 0, 20)

        assert [answer["output_ids"] for answer in answers] == [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
        assert metric(pair.decode, "retracted_reqs_total") > 0
        if host_kv_gb == "0":
            assert "retracted_offloaded" not in _metrics(pair)
            return
        assert metric(pair.decode, "retracted_num_host_tokens") == 0
        assert metric(pair.decode, "retracted_restored_tokens_total") > 0 or host_kv_gb != "1"
        assert (metric(pair.decode, "retracted_host_full_reqs_total") > 0) == (host_kv_gb != "1")


def _metrics(pair: PdPair) -> str:
    with pair.decode.client() as client:
        return client.get("/metrics").text
