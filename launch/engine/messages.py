"""The messages that travel between the HTTP process and the ranks (msgspec structs over ZMQ, msgpack).

Knows nothing of sockets, batches or models. One request has one `rid`, an integer unique in the server's life; `n > 1` and
batches are expanded by the HTTP side into one message each. Token ids are ints in [0, vocab_size). Times are seconds.

Direction: `ToRank` goes from the HTTP process to every rank of the request's DP group; `FromRank` comes back from the rank with
attention-TP rank 0 of each DP group (heartbeats and errors come from every rank).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from moesaic.eplb import status as eplb_status
from moesaic.overlap import calibration

RebalanceStatus = eplb_status.RebalanceStatus
"""The state of a rank's rebalance manager, for health and metrics."""

MAX_ROOM = (1 << 63) - 1
WARMUP_HOST = "2.2.2.2"
"""A `bootstrap_host` that no prefill instance has: SGLang's mark of a warm-up request, whose transfer is not made."""

OverlapProfile = calibration.Profile
"""Timings of straight and split steps, and the thresholds that follow from them."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, tag=False, omit_defaults=True):
    """How to choose the next token. All values were validated by the HTTP side.

    temperature 0 means greedy. top_k -1 means all. `max_new_tokens` is never None here. `stop_token_ids` includes the model's
    end-of-sequence ids unless `ignore_eos`. `seed` is always set (drawn by the HTTP side when the user gave none).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the prefill and the decode of a request meet: the prefill instance's bootstrap server, and a room in [0, 2^63).

    `prefill_dp_rank`: the DP rank that prefills; None: room % dp_size.
    """

    host: str
    port: int
    room: int
    prefill_dp_rank: int | None = None


WARMUP = Bootstrap(host=WARMUP_HOST, port=0, room=0)
"""Of a request that is to run on an instance with a role without another instance."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate", omit_defaults=True):
    """One sequence to generate. `logprob_start_len` -1: no prompt logprobs; else from that prompt position on.

    `bootstrap`: given on instances with a role, and only there.
    """

    rid: int
    input_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    return_logprob: bool = False
    top_logprobs_num: int = 0
    logprob_start_len: int = -1
    bootstrap: Bootstrap | None = None


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """End a request wherever it is. `finish` = True: its output is complete (a stop string matched); no answer is sent."""

    rid: int
    finish: bool = False


class ProfileOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What start_profile is told. Each rank writes <output_dir>/<profile_id>-rank<R>.trace.json.

    `output_dir` "": the folder of SGLANG_TORCH_PROFILER_DIR, else the system's temporary one. `num_steps`: steps that run the
    model, after which the profile ends by itself; None: until stop_profile. `profile_id` "": made of the command's id.
    """

    output_dir: str = ""
    num_steps: int | None = None
    profile_id: str = ""


class Control(msgspec.Struct, frozen=True, kw_only=True, tag="control", omit_defaults=True):
    """A server-wide command, sent to every rank; each DP leader answers with `ControlReply` of the same `control_id`.

    `profile`: for start_profile; None: all defaults.
    """

    control_id: int
    command: Literal[
        "flush_cache", "start_record", "stop_record", "dump_record", "start_profile", "stop_profile", "rebalance", "shutdown"
    ]
    profile: ProfileOptions | None = None


class Wake(msgspec.Struct, frozen=True, kw_only=True, tag="wake"):
    """Work has arrived at another DP rank: join the lockstep."""


ToRank = GenerateRequest | AbortRequest | Control | Wake


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log probabilities at one position: of the token itself (None for the very first prompt token), and of the top ones."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = []


TransferFailure = Literal["", "room", "aborted", "deadline", "lost", "refused", "corrupt"]
"""How a request failed between two instances; "": not there. room: its room is or was in use. The others as in disaggregation."""


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one step adds to one request.

    `finish_reason`: None while running; "stop" (`matched` holds the token id, which is not part of the text), "length", "abort".
    `prompt_logprobs` comes once, with the first output. `cached_tokens` is the prompt's prefix-cache hit in tokens.
    `queue_seconds`, with the first output: how long the request waited before it was admitted. `failed`, with "abort": not the
    request is at fault but the step that ran it, or, as `transfer_failure` says, its way from prefill to decode; `message` says
    what happened.
    """

    rid: int
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "abort"] | None = None
    matched: int | None = None
    message: str | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    queue_seconds: float | None = None
    failed: bool = False
    transfer_failure: TransferFailure = ""


class RoomLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Requests of a DP rank by the queue of disaggregation they are in, and what has become of those before.

    prefill: bootstrap (no decode instance has opened the room yet), inflight (computed, pages held for decode). decode: prealloc
    (no pages yet), transfer. num_failed: since the start. Of the last transfers: speed in GB/s and latency in ms, and the ms
    from the end of prefill's last chunk to the first token on decode, by the two machines' clocks; 0 before the first.
    """

    num_bootstrap: int = 0
    num_inflight: int = 0
    num_prealloc: int = 0
    num_transfer: int = 0
    num_failed: int = 0
    speed_gb_s: float = 0.0
    latency_ms: float = 0.0
    handover_ms: float = 0.0


class RetractionLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What has become of the KV of a DP rank's retracted requests, since the start; every rank of the group has the same.

    offloaded: copied to host memory; restored: copied back (what the prefix cache still had is not). host_full: requests to be
    computed again as host memory had no room; recompute_cheaper: as that takes less time. Of max_host_tokens, num_host_tokens are
    held now. copy_us, recompute_us: what a token of KV costs to copy there and back, and to compute, as measured at the start.
    """

    num_offloaded_reqs: int
    num_offloaded_tokens: int
    num_restored_tokens: int
    num_host_full_reqs: int
    num_recompute_cheaper_reqs: int
    num_host_tokens: int
    max_host_tokens: int
    copy_us: float
    recompute_us: float


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one DP rank's scheduler after a step. `rooms`: on instances with a role. `retraction`: where KV is kept."""

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    num_waiting_tokens: int
    gen_throughput: float
    cache_hit_rate: float
    num_retracted_reqs: int
    rooms: RoomLoad | None = None
    retraction: RetractionLoad | None = None


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs", omit_defaults=True):
    """All outputs of one step of one DP rank, with its load.

    Most sequences just go on by one token: those are only listed in `rids` and `tokens`; `outputs` holds all others.
    """

    dp_rank: int
    outputs: list[RequestOutput]
    load: LoadReport
    rids: list[int] = []
    tokens: list[int] = []


class ControlReply(msgspec.Struct, frozen=True, kw_only=True, tag="control_reply", omit_defaults=True):
    """Answer of one DP leader to a `Control`. `message`: what to tell the client (for dump_record: the file's path).

    `files`: of start_profile and stop_profile, the file of each rank of this DP group.
    """

    control_id: int
    dp_rank: int
    ok: bool
    message: str = ""
    files: tuple[str, ...] = ()


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Start-up progress of one rank: `phase` such as "load weights", done out of total units."""

    rank: int
    phase: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """A rank has finished starting. `phase_seconds` lists (phase, seconds); sizes in bytes and tokens.

    `overlap_profile`: from rank 0, where two-batch overlap is on: what it was told or measured.
    """

    rank: int
    max_total_num_tokens: int
    kv_bytes_per_token: int
    weight_bytes: int
    phase_seconds: list[tuple[str, float]]
    overlap_profile: OverlapProfile | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent by a thread of every rank once a second. `operation` is what the rank is in now, for `seconds`.

    `rebalance`: the state of its rebalance manager, where there is one.
    """

    rank: int
    step: int
    operation: str
    seconds: float
    rebalance: RebalanceStatus | None = None


class RankError(msgspec.Struct, frozen=True, kw_only=True, tag="rank_error"):
    """A rank is about to exit: what failed, in one line that names rank and operation, and the traceback."""

    rank: int
    message: str
    traceback: str


FromRank = StepOutputs | ControlReply | Progress | Ready | Heartbeat | RankError

to_rank_decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
from_rank_decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
encoder = msgspec.msgpack.Encoder()


def every_output(outputs: Iterable[RequestOutput], rids: list[int], tokens: list[int]) -> Iterator[RequestOutput]:
    """The outputs of a step one by one, those that just went on included."""
    yield from outputs
    for rid, token in zip(rids, tokens, strict=True):
        yield RequestOutput(rid=rid, token_ids=(token,))
