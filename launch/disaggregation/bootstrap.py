"""The bootstrap server: where the ranks of a prefill instance register and decode ranks ask who they are (HTTP, SGLang's routes).

    PUT /route      a prefill rank registers: 200, 400 for what is no registration, 409 for what does not fit the others
    GET /route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1
                    the instance's layout and all addresses; 503 until every rank has registered
    GET /route?prefill_dp_rank=D&prefill_cp_rank=0&target_tp_rank=T&target_pp_rank=0
                    the address of one rank
    GET /health     200

Standard library only; knows no rooms. A restarted instance registers under a new name, which makes the old registrations void.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

import msgspec

from moesaic.launch.disaggregation.protocol import KVLayout, LayoutMismatchError, check_same_kv

DEFAULT_PORT = 8998
MAX_BODY_BYTES = 1 << 20


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """What a prefill rank says of itself. SGLang's fields, and below them ours."""

    attn_tp_size: int
    attn_tp_rank: int
    attn_dp_size: int
    attn_dp_rank: int
    rank_ip: str
    rank_port: int
    page_size: int
    kv_cache_dtype: str
    attn_cp_size: int = 1
    attn_cp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    system_dp_size: int = 1
    system_dp_rank: int = 0
    load_balance_method: str = "follow_bootstrap_room"
    instance: str
    model_id: str
    tp_size: int
    ep_size: int
    bytes_per_token: int
    num_layers: int

    @property
    def layout(self) -> KVLayout:
        return KVLayout(
            model_id=self.model_id,
            tp_size=self.tp_size,
            dp_size=self.attn_dp_size,
            ep_size=self.ep_size,
            page_size=self.page_size,
            kv_dtype=self.kv_cache_dtype,
            bytes_per_token=self.bytes_per_token,
            num_layers=self.num_layers,
        )


class RankAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank's control connections are accepted."""

    rank_ip: str
    rank_port: int


class PrefillTopology(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill instance, complete. SGLang's fields, and below them ours; `addresses[dp_rank][attn_tp_rank]`."""

    attn_tp_size: int
    dp_size: int
    page_size: int
    kv_cache_dtype: str
    attn_cp_size: int = 1
    pp_size: int = 1
    follow_bootstrap_room: bool = True
    instance: str
    layout: KVLayout
    addresses: list[list[RankAddress]]


def registration(layout: KVLayout, *, instance: str, dp_rank: int, attn_tp_rank: int, address: tuple[str, int]) -> Registration:
    """What the rank with this place in this layout registers."""
    return Registration(
        attn_tp_size=layout.attn_tp_size,
        attn_tp_rank=attn_tp_rank,
        attn_dp_size=layout.dp_size,
        attn_dp_rank=dp_rank,
        rank_ip=address[0],
        rank_port=address[1],
        page_size=layout.page_size,
        kv_cache_dtype=layout.kv_dtype,
        instance=instance,
        model_id=layout.model_id,
        tp_size=layout.tp_size,
        ep_size=layout.ep_size,
        bytes_per_token=layout.bytes_per_token,
        num_layers=layout.num_layers,
    )


class RankTable:
    """The registrations of one instance at a time. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instance = ""
        self._layout: KVLayout | None = None
        self._ranks: dict[tuple[int, int], RankAddress] = {}

    def register(self, rank: Registration) -> None:
        """Take a rank in. Raises LayoutMismatchError when it does not fit the ranks of its instance that are here."""
        if not (0 <= rank.attn_dp_rank < rank.attn_dp_size and 0 <= rank.attn_tp_rank < rank.attn_tp_size):
            raise LayoutMismatchError(
                f"DP rank {rank.attn_dp_rank} of {rank.attn_dp_size}, attention-TP rank {rank.attn_tp_rank} of "
                f"{rank.attn_tp_size}: there is no such rank"
            )
        with self._lock:
            if rank.instance != self._instance or self._layout is None:
                self._instance, self._layout, self._ranks = rank.instance, rank.layout, {}
            self._check(rank, self._layout)
            address = RankAddress(rank_ip=rank.rank_ip, rank_port=rank.rank_port)
            self._ranks[rank.attn_dp_rank, rank.attn_tp_rank] = address

    def topology(self) -> PrefillTopology | str:
        """The complete instance, or what is missing."""
        with self._lock:
            layout = self._layout
            if layout is None:
                return "no prefill rank has registered yet"
            places = [[(dp, tp) for tp in range(layout.attn_tp_size)] for dp in range(layout.dp_size)]
            missing = [place for row in places for place in row if place not in self._ranks]
            if missing:
                names = ", ".join(f"DP rank {dp} attention-TP rank {tp}" for dp, tp in missing[:4])
                return f"{len(self._ranks)} of {layout.tp_size} prefill ranks have registered; missing: {names}"
            return PrefillTopology(
                attn_tp_size=layout.attn_tp_size,
                dp_size=layout.dp_size,
                page_size=layout.page_size,
                kv_cache_dtype=layout.kv_dtype,
                instance=self._instance,
                layout=layout,
                addresses=[[self._ranks[place] for place in row] for row in places],
            )

    @staticmethod
    def _check(rank: Registration, layout: KVLayout) -> None:
        try:
            check_same_kv(layout, rank.layout)
        except LayoutMismatchError as error:
            text = str(error).replace("prefill has", "the ranks before have").replace("decode has", "this rank has")
            raise LayoutMismatchError(f"instance {rank.instance}: {text}") from error
        if rank.layout != layout or rank.attn_tp_size != layout.attn_tp_size:
            text = f"the ranks before have the layout {layout}, this rank has {rank.layout}"
            raise LayoutMismatchError(f"instance {rank.instance}: {text}")


class BootstrapServer:
    """Serves from threads of its own until `close`. `port` 0 takes a free one; `address` says which. Raises OSError when taken."""

    def __init__(self, host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> None:
        self.table = RankTable()
        table = self.table

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                _answer(self, *_get(table, self.path))

            def do_PUT(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                if urlsplit(self.path).path != "/route" or length > MAX_BODY_BYTES:
                    _answer(self, 404, b"prefill ranks register with PUT /route")
                else:
                    _answer(self, *_put(table, self.rfile.read(length)))

            def log_message(self, format: str, *args: object) -> None:
                """Registrations and questions are not news."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.address: tuple[str, int] = (host, self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="bootstrap server", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _put(table: RankTable, body: bytes) -> tuple[int, bytes]:
    try:
        table.register(msgspec.json.decode(body, type=Registration))
    except msgspec.MsgspecError as error:
        return 400, f"no registration: {error}".encode()
    except LayoutMismatchError as error:
        return 409, str(error).encode()
    return 200, b"OK"


def _get(table: RankTable, target: str) -> tuple[int, bytes]:
    url = urlsplit(target)
    if url.path == "/health":
        return 200, b"OK"
    if url.path != "/route":
        return 404, b"GET /route or GET /health"
    try:
        query = parse_qs(url.query)
        names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
        dp_rank, cp_rank, tp_rank, pp_rank = (int(query[name][0]) for name in names)
    except (KeyError, ValueError):
        return 400, b"prefill_dp_rank, prefill_cp_rank, target_tp_rank and target_pp_rank must be numbers; all -1: the whole layout"
    topology = table.topology()
    if isinstance(topology, str):
        return 503, topology.encode()
    if (dp_rank, cp_rank, tp_rank, pp_rank) == (-1, -1, -1, -1):
        return 200, msgspec.json.encode(topology)
    if dp_rank in range(topology.dp_size) and tp_rank in range(topology.attn_tp_size) and cp_rank == pp_rank == 0:
        return 200, msgspec.json.encode(topology.addresses[dp_rank][tp_rank])
    return 404, f"no DP rank {dp_rank}, CP rank {cp_rank}, attention-TP rank {tp_rank}, PP rank {pp_rank} here".encode()


def _answer(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Type", "application/json" if body[:1] == b"{" else "text/plain")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
