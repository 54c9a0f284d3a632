"""One prefill or decode rank in a process of its own, steered by lines on its standard input; for tests that kill it.

    python pd_process.py prefill|decode BOOTSTRAP_PORT BACKEND INSTANCE

A prefill process runs the bootstrap server too. It prints "ready", then answers each line:
    room R | send R PAGES... | finish R | receive R PAGES... | state R | hold (a prefill rank's TCP pages stand still from now on)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from pd_ranks import make_layout, start_decode_rank, start_prefill_rank

from moesaic.launch.disaggregation import tcp_serve
from moesaic.launch.disaggregation.bootstrap import BootstrapServer
from moesaic.launch.disaggregation.receiver_room import ReceiverRoom
from moesaic.launch.disaggregation.sender_room import SenderRoom


def hold_pages() -> None:
    """Runs of pages are served no more: a transfer that has begun never ends. Everything else goes on."""
    never = threading.Event()
    tcp_serve.PageServer._send_run = lambda *_: never.wait()  # type: ignore[assignment]


def main(role: str, port: int, backend: str, instance: str) -> None:
    rooms: dict[int, SenderRoom | ReceiverRoom] = {}
    make: Callable[[int], SenderRoom | ReceiverRoom]
    if role == "prefill":
        server = BootstrapServer(port=port)
        make = start_prefill_rank(make_layout(), 0, server.address[1], backend, instance=instance).sender  # type: ignore[arg-type]
    else:
        make = start_decode_rank(make_layout(), 0, port, backend, instance=instance).receiver  # type: ignore[arg-type]
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(line.split(), rooms, make), flush=True)


def answer(words: list[str], rooms: dict[int, SenderRoom | ReceiverRoom], make: Callable[[int], SenderRoom | ReceiverRoom]) -> str:
    command, room, pages = words[0], int([*words, "0"][1]), [int(word) for word in words[2:]]
    if command == "hold":
        hold_pages()
        return "held"
    if command == "room":
        rooms[room] = make(room)
        return "made"
    end = rooms[room]
    if command == "send" and isinstance(end, SenderRoom):
        end.send(pages)
    elif command == "finish" and isinstance(end, SenderRoom):
        end.finish(b"first token")
    elif command == "receive" and isinstance(end, ReceiverRoom):
        end.receive(pages)
    return f"{end.state.name} {end.failure or ''}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
