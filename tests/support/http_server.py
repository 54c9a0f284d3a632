"""A real HTTP server (uvicorn on a real port) in front of echo ranks, for tests of the HTTP layer alone."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import tokenizers
from echo_ranks import EchoRank
from tokenizers import decoders, models, pre_tokenizers, trainers

from moesaic.launch.http.client import RankClient
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.errors import EngineFailedError
from moesaic.launch.http.serve import bind, serve

CONTEXT_LENGTH = 512
TEXT = "the quick brown fox jumps over the lazy dog. Où est le café? 日本語のテキスト 🦊🐕 emoji"
TEMPLATE = (
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def _trained(vocab_size: int) -> str:
    return _train(vocab_size).to_str()


def byte_level_tokenizer(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer, as DeepSeek's is; a new object each time."""
    return tokenizers.Tokenizer.from_str(_trained(vocab_size))


def _train(vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>", "<｜User｜>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "bos_token": "<bos>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>"},
        "add_bos_token": True,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.002)


class HttpServer:
    """`with HttpServer(folder) as server:`; `server.ranks` are the echo ranks. Settings are fields of HttpConfig."""

    def __init__(self, model_path: Path, *, dp_size: int = 1, attn_tp_size: int = 1, **settings: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moesaic-http-"))
        self._sock = bind("127.0.0.1", 0)
        world_size = dp_size * attn_tp_size
        base: dict[str, Any] = {
            "model_path": str(model_path),
            "served_model_name": "echo",
            "context_length": CONTEXT_LENGTH,
            "vocab_size": byte_level_tokenizer().get_vocab_size(),
            "eos_token_ids": (1,),
            "to_rank_endpoints": tuple(f"ipc://{self._folder}/to{rank}" for rank in range(world_size)),
            "from_rank_endpoint": f"ipc://{self._folder}/from",
            "host": "127.0.0.1",
            "port": self._sock.getsockname()[1],
            "log_level": "warning",
            "version": "test",
        }
        self.config = HttpConfig(**{**base, "dp_size": dp_size, "attn_tp_size": attn_tp_size, "world_size": world_size, **settings})
        self.url = f"http://127.0.0.1:{self.config.port}"
        self.ranks = [EchoRank(rank, self.config) for rank in range(world_size)]
        self.failure: str | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="http server")

    def __enter__(self) -> Self:
        for rank in self.ranks:
            rank.start()
        self._thread.start()
        assert self._started.wait(20)
        self.http = httpx.Client(base_url=self.url, timeout=20)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.http.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        for rank in self.ranks:
            rank.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.client = RankClient(self.config)
        try:
            await self.client.wait_ready(10)
            await serve(self.config, self.client, sock=self._sock, stop=self._stop, on_started=self._started.set)
        except EngineFailedError as error:
            self.failure = str(error)
        finally:
            await self.client.close()
            self._sock.close()

    def post(self, path: str, body: object, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def generate(self, **body: Any) -> Any:
        answer = self.post("/generate", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, body: object) -> list[str]:
        """The data of every event of a streamed answer."""
        with self.http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
