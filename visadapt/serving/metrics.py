"""What a server counts, in the format of Prometheus."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from visadapt.optional import require

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
"""Upper ends of the bins of latencies."""


class Metrics:
    """Counters and histograms of one server, each server with a registry of its own.

    Raises:
        VisadaptError: prometheus_client is not installed.
    """

    def __init__(self) -> None:
        client = require("prometheus_client", "serving", "visadapt[serve]")
        self.registry: Any = client.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests: Any = client.Counter("visadapt_requests", "Requests by outcome.", ["outcome"], **own)
        self.latency: Any = client.Histogram(
            "visadapt_latency_seconds", "Time from arrival to answer, per sample.", ["task"], buckets=SECONDS, **own
        )
        self.wait: Any = client.Histogram(
            "visadapt_wait_seconds", "Time that a sample waits for its batch.", buckets=SECONDS, **own
        )
        self.batch: Any = client.Histogram(
            "visadapt_batch_size", "Samples per forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **own
        )
        self.tasks: Any = client.Histogram(
            "visadapt_batch_tasks", "Tasks per forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )
        self.loaded: Any = client.Gauge("visadapt_tasks_loaded", "Tasks in memory.", multiprocess_mode="livesum", **own)
        self.waiting: Any = client.Gauge("visadapt_waiting", "Samples that wait.", multiprocess_mode="livesum", **own)
        self.loads: Any = client.Counter("visadapt_loads", "Tasks loaded from their files.", **own)
        self.evictions: Any = client.Counter("visadapt_evictions", "Tasks removed to make room for others.", **own)
        self.restarts: Any = client.Counter(
            "visadapt_worker_restarts", "Threads and processes replaced after a crash.", **own
        )
        self._text = client.generate_latest
        self.content_type: str = client.CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """Return all values in Prometheus' text format."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            # the sum over all processes of the server, whichever of them is asked
            registry = type(registry)()
            require("prometheus_client.multiprocess", "serving", "visadapt[serve]").MultiProcessCollector(registry)
        text: bytes = self._text(registry)
        return text


class _Families:
    """Families of metrics as a registry collects them."""

    def __init__(self, families: Iterable[Any]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Any]:
        """Return them."""
        return self._families


def summed(texts: Iterable[bytes]) -> bytes:
    """Add up the metrics of several processes.

    Args:
        texts: of each process, in Prometheus' text format.

    Returns:
        One text with the sums; the time when a counter began is the earliest.
    """
    client = require("prometheus_client", "serving", "visadapt[serve]")
    parser = require("prometheus_client.parser", "serving", "visadapt[serve]")
    families: dict[str, Any] = {}
    samples: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], Any]] = {}
    for text in texts:
        for family in parser.text_string_to_metric_families(text.decode()):
            families.setdefault(family.name, family)
            known = samples.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                value = sample.value
                if key in known:
                    other = known[key].value
                    value = min(other, value) if sample.name.endswith("_created") else other + value
                known[key] = sample._replace(value=value)
    for name, family in families.items():
        family.samples = list(samples[name].values())
    registry = client.CollectorRegistry()
    registry.register(_Families(families.values()))
    joined: bytes = client.generate_latest(registry)
    return joined
