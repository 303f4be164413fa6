"""Figures for Prometheus: what the dispatcher counts, and what the ledger says at the moment of asking.

The dispatcher writes its counts into a file of the run folder every few seconds; the gateway, which Prometheus asks,
reads them from there and adds the state of queue, slots and webhooks. Counts start again when their process does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.ledger import Outcome, QueueRow, RequestRow, SlotRow

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class DispatcherMetrics:
    """What happened to requests since this dispatcher began."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "upscaler", "registry": self._registry}
        self._ended = Counter(
            "requests", "Requests that a slot ended.", ["endpoint", "status", "error_type"], **options
        )
        self._lost = Counter("attempts_lost", "Attempts whose slot was lost.", ["endpoint"], **options)
        self._killed = Counter("slots_killed", "Slots that were ended because they did not react.", **options)
        timed: dict[str, Any] = {"labelnames": ["endpoint"], "buckets": SECONDS, **options}
        self._waited = Histogram("wait_seconds", "From submission to the start.", **timed)
        self._ran = Histogram("run_seconds", "From the start to the recorded end.", **timed)
        self._made = Histogram(
            "inference_seconds_per_megapixel", "Seconds of the pipeline per 10^6 px of the result.", **timed
        )

    def started(self, row: RequestRow) -> None:
        """A slot took a request."""
        self._waited.labels(row.endpoint).observe(time.time() - row.created)

    def ended(self, endpoint: str, outcome: Outcome, duration_s: float) -> None:
        """A slot ended a request, well or badly."""
        self._ended.labels(endpoint, str(outcome.status), outcome.error_type or "").inc()
        self._ran.labels(endpoint).observe(duration_s)
        megapixels = sum(_pictures(outcome.body)) / 1e6
        if outcome.inference_s is not None and megapixels:
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


def exposition(
    queue: Sequence[QueueRow], num_webhooks: int, slots: Iterable[SlotRow], *, is_ready: bool, run_dir: Path
) -> bytes:
    """Everything in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families([*_state(queue, num_webhooks, slots, is_ready), *_written(run_dir)]))
    return prometheus_client.generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """What it was made with."""
        return self._families


def _state(queue: Sequence[QueueRow], num_webhooks: int, slots: Iterable[SlotRow], is_ready: bool) -> Iterator[Metric]:
    depth = GaugeMetricFamily(
        "upscaler_requests_open", "Requests that wait or run.", labels=["endpoint", "state", "priority"]
    )
    age = GaugeMetricFamily(
        "upscaler_oldest_request_seconds", "Age of the oldest one.", labels=["endpoint", "state", "priority"]
    )
    now = time.time()
    for row in queue:
        labels = [row.endpoint, row.state, row.priority]
        depth.add_metric(labels, row.number)
        age.add_metric(labels, max(0.0, now - row.oldest))
    yield depth
    yield age
    yield GaugeMetricFamily("upscaler_webhooks_pending", "Webhooks that are not delivered yet.", value=num_webhooks)
    yield GaugeMetricFamily("upscaler_ready", "Whether some slot can take a request.", value=float(is_ready))
    states = GaugeMetricFamily("upscaler_slot", "Slots by state.", labels=["slot", "state", "device", "weights"])
    for slot in slots:
        states.add_metric([slot.id, slot.state, slot.device, slot.weights], 1.0)
    yield states


def _written(run_dir: Path) -> list[Metric]:
    """What other roles wrote; a figure that several of them have appears once, with the samples of all."""
    families: dict[str, Metric] = {}
    for path in sorted(run_dir.glob("*.prom")):
        for family in text_string_to_metric_families(path.read_text()):
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)
    return list(families.values())
