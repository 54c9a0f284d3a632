"""The objects of the Responses API: the response itself, its one output item, and the events that build them up."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.launch.http.errors import ApiError
from moesaic.launch.http.job import Job
from moesaic.launch.http.reply import DONE, event
from moesaic.launch.http.run import Generated, Run
from moesaic.launch.http.services import Services


@dataclass(frozen=True, kw_only=True)
class ResponseShape:
    """Makes the objects of one response. `settings` are the request's, repeated in every one of them."""

    id: str
    item_id: str
    created_at: int
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def response(self, status: str, output: Sequence[dict[str, Any]] = (), **more: object) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "text": {"format": {"type": "text"}},
            "usage": None,
            **self.settings,
            **more,
        }

    def ended(self, sequence: Generated) -> dict[str, Any]:
        """The whole response: completed, or incomplete when the model had more to say."""
        status = self.status(sequence)
        output = [self.item(status, [self.part(sequence.text)])]
        reason = {"reason": "max_output_tokens" if _cut(sequence) else "aborted"}
        details = None if status == "completed" else reason
        return self.response(status, output, usage=_usage(sequence), incomplete_details=details)

    def failed(self, error: ApiError) -> dict[str, Any]:
        return self.response("failed", error={"code": "server_error", "message": error.message})

    def status(self, sequence: Generated) -> str:
        return "completed" if sequence.finish is not None and sequence.finish.kind == "stop" else "incomplete"

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _cut(sequence: Generated) -> bool:
    return sequence.finish is not None and sequence.finish.kind == "length"


def _usage(sequence: Generated) -> dict[str, Any]:
    inputs, outputs = len(sequence.job.input_ids), len(sequence.output_ids)
    return {
        "input_tokens": inputs,
        "input_tokens_details": {"cached_tokens": sequence.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": outputs,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": inputs + outputs,
    }


class _Events:
    """Numbers the events."""

    def __init__(self, shape: ResponseShape) -> None:
        self._shape = shape
        self._next = 0

    def make(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self._next, **fields}
        self._next += 1
        return event(data, kind)

    def inside(self, kind: str, **fields: object) -> bytes:
        """An event about the one text part of the one item."""
        return self.make(kind, item_id=self._shape.item_id, output_index=0, content_index=0, **fields)


async def stream_events(services: Services, jobs: Sequence[Job], shape: ResponseShape) -> AsyncGenerator[bytes, None]:
    events = _Events(shape)
    opened = False
    try:
        with Run(services, jobs) as run:
            async for update in run.updates():
                if not opened:
                    opened = True
                    yield _opening(events, shape)
                if update.text:
                    yield events.inside("response.output_text.delta", delta=update.text, logprobs=[])
            yield _closing(events, shape, run.sequences[0])
    except ApiError as error:
        if not opened:
            raise
        yield events.make("response.failed", response=shape.failed(error))
    yield DONE


def _opening(events: _Events, shape: ResponseShape) -> bytes:
    running = shape.response("in_progress")
    return b"".join(
        (
            events.make("response.created", response=running),
            events.make("response.in_progress", response=running),
            events.make("response.output_item.added", output_index=0, item=shape.item("in_progress", [])),
            events.inside("response.content_part.added", part=shape.part("")),
        )
    )


def _closing(events: _Events, shape: ResponseShape, sequence: Generated) -> bytes:
    text, status = sequence.text, shape.status(sequence)
    return b"".join(
        (
            events.inside("response.output_text.done", text=text, logprobs=[]),
            events.inside("response.content_part.done", part=shape.part(text)),
            events.make("response.output_item.done", output_index=0, item=shape.item(status, [shape.part(text)])),
            events.make(f"response.{status}", response=shape.ended(sequence)),
        )
    )
