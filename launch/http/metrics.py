"""Prometheus metrics under SGLang's stems with the prefix `moesaic:`. Counts what the HTTP side sees and shows the
ranks' loads.

Each server has its own registry. Metrics that nothing produces (speculation; PD without a role) are absent, not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesaic.launch.engine.messages import LoadReport, RebalanceStatus, RoomLoad

PREFIX = "moesaic:"
TIME_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
BETWEEN_TOKENS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 2, 4, 8)
WHOLE_REQUEST = (0.05, 0.1, 0.2, 0.4, 0.8, 1, 2, 5, 10, 20, 40, 60, 100, 200, 400, 600, 1200)


class _Loads(Collector):
    """The ranks' last load reports as gauges, read when Prometheus asks."""

    def __init__(self, model: str, loads: Callable[[], Sequence[LoadReport]]) -> None:
        self._model = model
        self._loads = loads

    def collect(self) -> Iterable[GaugeMetricFamily]:
        loads = self._loads()
        rows: list[tuple[str, str, Callable[[LoadReport], float]]] = [
            ("num_running_reqs", "Requests in the running batch", lambda load: load.num_running_reqs),
            ("num_queue_reqs", "Requests waiting for a place", lambda load: load.num_waiting_reqs),
            ("num_used_tokens", "Tokens of KV cache in use", lambda load: load.num_used_tokens),
            ("max_total_num_tokens", "Tokens of KV cache that there are", lambda load: load.max_total_num_tokens),
            ("token_usage", "Share of the KV cache in use", token_usage),
            ("gen_throughput", "Generated tokens per second", lambda load: load.gen_throughput),
            ("cache_hit_rate", "Share of prompt tokens found in the prefix cache", lambda load: load.cache_hit_rate),
            ("num_retracted_reqs", "Requests put back for want of KV cache", lambda load: load.num_retracted_reqs),
        ]
        for name, text, value in rows:
            family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name", "dp_rank"))
            for load in loads:
                family.add_metric((self._model, str(load.dp_rank)), value(load))
            yield family


class _Rooms(Collector):
    """The queues of a prefill or decode instance; nothing on a server without a role."""

    def __init__(self, model: str, role: str, loads: Callable[[], Sequence[LoadReport]]) -> None:
        self._model = model
        self._role = role
        self._loads = loads

    def collect(self) -> Iterable[Metric]:
        if self._role == "null":
            return
        failed = CounterMetricFamily(
            PREFIX + "num_transfer_failed_reqs", "Requests that failed between prefill and decode", labels=("model_name", "dp_rank")
        )
        families = [
            (GaugeMetricFamily(PREFIX + name, text, labels=("model_name", "dp_rank")), value) for name, text, value in self._rows()
        ]
        for load in self._loads():
            rooms, labels = load.rooms or RoomLoad(), (self._model, str(load.dp_rank))
            failed.add_metric(labels, rooms.num_failed)
            for family, value in families:
                family.add_metric(labels, value(rooms))
        yield failed
        yield from (family for family, _ in families)

    def _rows(self) -> list[tuple[str, str, Callable[[RoomLoad], float]]]:
        if self._role == "prefill":
            return [
                (
                    "num_prefill_bootstrap_queue_reqs",
                    "Requests that no decode instance has opened yet",
                    attrgetter("num_bootstrap"),
                ),
                ("num_prefill_inflight_queue_reqs", "Requests whose pages are held for decode", attrgetter("num_inflight")),
            ]
        return [
            ("num_decode_prealloc_queue_reqs", "Requests that wait for pages", attrgetter("num_prealloc")),
            ("num_decode_transfer_queue_reqs", "Requests whose pages are being fetched", attrgetter("num_transfer")),
            ("kv_transfer_speed_gb_s", "Speed of the last transfer", attrgetter("speed_gb_s")),
            ("kv_transfer_latency_ms", "Duration of the last transfer", attrgetter("latency_ms")),
            (
                "kv_handover_latency_ms",
                "From the end of prefill's last chunk to the first token here, by the two machines' clocks, of the last request",
                attrgetter("handover_ms"),
            ),
        ]


class _Retraction(Collector):
    """Retracted requests, and where their KV may be kept what has become of it."""

    def __init__(self, model: str, loads: Callable[[], Sequence[LoadReport]]) -> None:
        self._model = model
        self._loads = loads

    def collect(self) -> Iterable[Metric]:
        loads = self._loads()
        yield self._counter("reqs", "Requests put back for want of KV cache", loads, lambda load: load.num_retracted_reqs)
        kept = [load for load in loads if load.retraction is not None]
        if kept:
            yield from self._kept(kept)

    def _kept(self, loads: Sequence[LoadReport]) -> Iterable[Metric]:
        for name, text in (
            ("offloaded_reqs", "Retracted requests whose KV was copied to host memory"),
            ("offloaded_tokens", "Tokens of KV copied to host memory"),
            ("restored_tokens", "Tokens of KV copied back from host memory"),
            ("host_full_reqs", "Retracted requests computed again as host memory was full"),
            ("recompute_cheaper_reqs", "Retracted requests computed again as that takes less time than to copy"),
        ):
            yield self._counter(name, text, loads, attrgetter(f"retraction.num_{name}"))
        for name, text in (("num_host_tokens", "Tokens of KV in host memory"), ("max_host_tokens", "Room for them")):
            gauge = GaugeMetricFamily(f"{PREFIX}retracted_{name}", text, labels=("model_name", "dp_rank"))
            for load in loads:
                gauge.add_metric((self._model, str(load.dp_rank)), getattr(load.retraction, name))
            yield gauge

    def _counter(
        self, name: str, text: str, loads: Sequence[LoadReport], value: Callable[[LoadReport], float]
    ) -> CounterMetricFamily:
        counter = CounterMetricFamily(f"{PREFIX}retracted_{name}", text, labels=("model_name", "dp_rank"))
        for load in loads:
            counter.add_metric((self._model, str(load.dp_rank)), value(load))
        return counter


class _Rebalancing(Collector):
    """The state of the expert rebalance, read when Prometheus asks; nothing where experts do not move."""

    def __init__(self, model: str, status: Callable[[], RebalanceStatus | None]) -> None:
        self._model = model
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        if status is None:
            return
        yield from self._balances(status)
        gauges = {
            "eplb_degraded": ("1 while the last rebalance was abandoned or a part of it is stuck", float(status.degraded)),
            "eplb_last_move_seconds": ("How long the last movement of weights took", status.last_move_s),
        }
        if status.last_predicted is not None:
            predicted = status.last_predicted
            gauges["eplb_predicted_balancedness"] = ("What the last plan promised for its window", predicted.balancedness)
            gauges["eplb_predicted_balancedness_gap"] = ("How far that is below its bound, as a fraction", predicted.gap)
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        cycles = CounterMetricFamily(PREFIX + "eplb_cycles", "Rebalances by how they ended", labels=("model_name", "outcome"))
        for outcome, count in (
            ("committed", status.committed_cycles),
            ("abandoned", status.abandoned_cycles),
            ("skipped", status.skipped_cycles),
        ):
            cycles.add_metric((self._model, outcome), count)
        yield cycles
        moved = CounterMetricFamily(PREFIX + "eplb_moved_bytes", "Weights that one rank has received", labels=("model_name",))
        moved.add_metric((self._model,), status.bytes_moved)
        yield moved

    def _balances(self, status: RebalanceStatus) -> Iterable[GaugeMetricFamily]:
        """A forward mode without tokens in the last window is absent."""
        rows = [
            ("", "Mean / max GPU load of the last window", attrgetter("balancedness")),
            ("_bound", "The most that any placement in as many slots could have had", attrgetter("bound")),
            ("_gap", "How far balancedness is below its bound, as a fraction of the bound", attrgetter("gap")),
        ]
        for suffix, text, value in rows:
            family = GaugeMetricFamily(PREFIX + "eplb_balancedness" + suffix, text, labels=("model_name", "forward_mode"))
            for mode, balance in status.last_balances.items():
                family.add_metric((self._model, mode), value(balance))
            yield family


def token_usage(load: LoadReport) -> float:
    return load.num_used_tokens / load.max_total_num_tokens if load.max_total_num_tokens else 0.0


class Metrics:
    """Counters and histograms of one server. Times are seconds."""

    def __init__(
        self,
        model: str,
        loads: Callable[[], Sequence[LoadReport]],
        rebalance: Callable[[], RebalanceStatus | None] = lambda: None,
        role: str = "null",
    ) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(_Loads(model, loads))
        self._registry.register(_Retraction(model, loads))
        self._registry.register(_Rebalancing(model, rebalance))
        self._registry.register(_Rooms(model, role, loads))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens that were found in the prefix cache")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens")
        self.num_requests = self._counter("num_requests", "Sequences that have ended, however they did")
        self.num_aborted = self._counter("num_aborted_requests", "Sequences that were aborted or failed")
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Until the first token", TIME_TO_FIRST)
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "Between tokens", BETWEEN_TOKENS)
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "From arrival to the last token", WHOLE_REQUEST)
        self.queue_time = self._histogram("queue_time_seconds", "Waiting in the rank's queue", TIME_TO_FIRST)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(PREFIX + name, text, ("model_name",), registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, ("model_name",), registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)
