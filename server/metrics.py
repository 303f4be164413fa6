"""Figures for Prometheus: what dispatcher and gateway count, and what the ledger says at the moment of asking.

The dispatcher writes its counts into a file of the run folder every few seconds; the gateway, which Prometheus asks,
reads them from there and adds its own, and the state of queue, slots and webhooks. Counts start again when their
process does. Labels have few values: endpoints, states, slots, our words for failures and stages; never what callers
or files are called.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.endpoints import ENDPOINTS
from server.ledger import Backlog, Mode, Outcome, QueueRow, RequestRow, SlotReport, SlotRow, State
from server.ledger.ledger import START_TIMEOUT

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
NAMESPACE = "upscaler"
OPEN = (State.IN_QUEUE, State.IN_PROGRESS)
LEVELS = ("device", "host")
BIRTHS = "_created"  # when each counter began: of no use to anybody
WHOLE = "inference"  # among the seconds by stage: of all of them
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class RequestCounter:
    """Requests that came to an end, by how; several processes count, and their sums are told."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "requests",
            "Requests that ended, well or badly.",
            ["endpoint", "status", "error_type"],
            namespace=NAMESPACE,
            registry=registry,
        )

    def count(self, endpoint: str, outcome: Outcome) -> None:
        """One more."""
        self._ended.labels(endpoint, str(outcome.status), outcome.error_type or "").inc()


class GatewayMetrics:
    """What ended in the gateway since it began: refused when it came, or cancelled while it waited."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ended = RequestCounter(self.registry)


class DispatcherMetrics:
    """What happened to requests since this dispatcher began."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._ended = RequestCounter(self._registry)
        options: dict[str, Any] = {"namespace": NAMESPACE, "registry": self._registry}
        self._lost = Counter("attempts_lost", "Attempts whose slot was lost.", ["endpoint"], **options)
        self._killed = Counter("slots_killed", "Slots that were ended because they did not react.", **options)
        self._pixels = Counter("output_megapixels", "Sizes of all results, 10^6 px.", ["endpoint"], **options)
        timed: dict[str, Any] = {"labelnames": ["endpoint"], "buckets": SECONDS, **options}
        self._waited = Histogram("wait_seconds", "From submission to the start.", **timed)
        self._ran = Histogram("run_seconds", "From the start to the recorded end.", **timed)
        self._made = Histogram(
            "inference_seconds_per_megapixel", "Seconds of the pipeline per 10^6 px of the result.", **timed
        )
        self._stages = Histogram(
            "stage_seconds", "Seconds of each stage.", **timed | {"labelnames": ["endpoint", "stage"]}
        )

    def started(self, row: RequestRow) -> None:
        """A slot took a request."""
        self._waited.labels(row.endpoint).observe(time.time() - row.created)

    def expired(self, endpoint: str) -> None:
        """A request was not started in time."""
        self._ended.count(endpoint, START_TIMEOUT)

    def ended(self, endpoint: str, outcome: Outcome, duration_s: float) -> None:
        """A slot ended a request, well or badly."""
        self._ended.count(endpoint, outcome)
        self._ran.labels(endpoint).observe(duration_s)
        for stage, seconds in outcome.timings.items():
            if stage != WHOLE:
                self._stages.labels(endpoint, stage).observe(seconds)
        megapixels = sum(_pictures(outcome.body)) / 1e6
        if outcome.inference_s is not None and megapixels:
            self._pixels.labels(endpoint).inc(megapixels)
            self._made.labels(endpoint).observe(outcome.inference_s / megapixels)

    def lost(self, endpoint: str) -> None:
        """An attempt ended without an outcome."""
        self._lost.labels(endpoint).inc()

    def killed(self) -> None:
        """A slot was ended by force."""
        self._killed.inc()

    def write(self, path: Path) -> None:
        """Put everything into a file, whole or not at all."""
        prometheus_client.write_to_textfile(str(path), self._registry)


def _pictures(value: Any) -> Iterator[int]:
    """Pixels of each picture in an output."""
    if isinstance(value, dict):
        if isinstance(value.get("width"), int) and isinstance(value.get("height"), int):
            yield value["width"] * value["height"]
        for member in value.values():
            yield from _pictures(member)
    elif isinstance(value, list):
        for member in value:
            yield from _pictures(member)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What the ledger says at the moment of asking."""

    queue: Sequence[QueueRow]
    webhooks: Backlog
    slots: Sequence[SlotRow]
    is_ready: bool
    ready_endpoints: Collection[str]
    mode: Mode


def exposition(moment: Moment, own: GatewayMetrics, run_dir: Path) -> bytes:
    """Everything in Prometheus' text format."""
    counted = _merged([_written(run_dir), own.registry.collect()])
    registry = CollectorRegistry()
    registry.register(_Families([*_of_queue(moment), *_of_server(moment), *_of_slots(moment.slots), *counted]))
    return prometheus_client.generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """What it was made with."""
        return self._families


def _of_queue(moment: Moment) -> Iterator[Metric]:
    names = ["endpoint", "state", "priority"]
    depth = GaugeMetricFamily("upscaler_requests_open", "Requests that wait or run.", labels=names)
    age = GaugeMetricFamily("upscaler_oldest_request_seconds", "Age of the oldest one.", labels=names)
    now = time.time()
    found = {(row.endpoint, row.state, row.priority): row for row in moment.queue}
    # What is empty is told as well: a figure that is not there cannot fall to zero.
    usual = [(endpoint, state.value, "normal") for endpoint in ENDPOINTS for state in OPEN]
    for labels in sorted({*usual, *found}):
        row = found.get(labels)
        depth.add_metric(labels, row.number if row else 0)
        age.add_metric(labels, max(0.0, now - row.oldest) if row else 0.0)
    yield depth
    yield age
    yield GaugeMetricFamily(
        "upscaler_webhooks_pending", "Webhooks that are not delivered yet.", value=moment.webhooks.number
    )
    oldest = moment.webhooks.oldest
    yield GaugeMetricFamily(
        "upscaler_oldest_webhook_seconds", "Age of the oldest one.", value=0.0 if oldest is None else now - oldest
    )


def _of_server(moment: Moment) -> Iterator[Metric]:
    yield GaugeMetricFamily("upscaler_ready", "Whether some slot can take a request.", value=float(moment.is_ready))
    able = GaugeMetricFamily("upscaler_endpoint_ready", "Whether a slot can serve it.", labels=["endpoint"])
    for endpoint in ENDPOINTS:
        able.add_metric([endpoint], float(endpoint in moment.ready_endpoints))
    yield able
    mode = GaugeMetricFamily("upscaler_mode", "What the operator has set.", labels=["mode"])
    for one in Mode:
        mode.add_metric([one.value], float(one is moment.mode))
    yield mode


def _of_slots(slots: Sequence[SlotRow]) -> Iterator[Metric]:
    states = GaugeMetricFamily("upscaler_slot", "Slots by state.", labels=["slot", "state", "device", "weights"])
    memory = GaugeMetricFamily(
        "upscaler_device_memory_bytes", "Memory of the device: total, free, taken by the slot.", labels=["slot", "part"]
    )
    held = GaugeMetricFamily("upscaler_models_bytes", "Sizes of loaded models.", labels=["slot", "level"])
    loads = CounterMetricFamily("upscaler_model_loads", "Models loaded from disk.", labels=["slot"])
    seconds = CounterMetricFamily("upscaler_model_load_seconds", "Seconds that took.", labels=["slot"])
    returns = CounterMetricFamily("upscaler_model_returns", "Models brought back from host memory.", labels=["slot"])
    evictions = CounterMetricFamily("upscaler_model_evictions", "Models moved away.", labels=["slot", "to"])
    for slot in slots:
        states.add_metric([slot.id, slot.state, slot.device, slot.weights], 1.0)
        report = slot.report if slot.state != "down" else SlotReport()
        for part, size_bytes in report.memory.items():
            memory.add_metric([slot.id, part], size_bytes)
        for level in LEVELS:
            held.add_metric([slot.id, level], sum(one.size_bytes for one in report.models if one.level == level))
        loads.add_metric([slot.id], report.counts.get("loads", 0))
        seconds.add_metric([slot.id], report.counts.get("load_s", 0.0))
        returns.add_metric([slot.id], report.counts.get("returns", 0))
        for to in ("host", "disk"):
            evictions.add_metric([slot.id, to], report.counts.get(f"moves_to_{to}", 0))
    yield from (states, memory, held, loads, seconds, returns, evictions)


def _written(run_dir: Path) -> Iterator[Metric]:
    """What other roles wrote."""
    for path in sorted(run_dir.glob("*.prom")):
        yield from text_string_to_metric_families(path.read_text())


def _merged(sources: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Each family once: samples of all sources, those with equal labels added up."""
    families: dict[str, Metric] = {}
    for family in chain.from_iterable(sources):
        if family.name.endswith(BIRTHS):
            continue
        known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        places = {_place(sample): n for n, sample in enumerate(known.samples)}
        for sample in family.samples:
            if sample.name.endswith(BIRTHS):
                continue
            n = places.get(_place(sample))
            if n is None:
                known.samples.append(sample)
            else:
                known.samples[n] = sample._replace(value=known.samples[n].value + sample.value)
    return list(families.values())


def _place(sample: Sample) -> tuple[Any, ...]:
    return (sample.name, *sorted(sample.labels.items()))
