"""What the server counts, for Prometheus. One registry a server, so that several can live in a process."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters, gauges and histograms; `docs/serving.md` lists them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._count("requests", "Answers, by route and status.", ["route", "status"])
        self.request_seconds = self._measure(
            "request_seconds", "From a request's head to the end of its answer.", SECONDS, ["route"]
        )
        self.tokens_in = self._count("prompt_tokens", "Positions read, audio included.")
        self.tokens_out = self._count("generated_tokens", "Tokens written.")
        self.audio_seconds = self._count("audio_seconds", "Seconds of audio heard.")
        self.dropped = self._count("dropped", "Requests given up because the client had gone.")
        self.batch_size = self._measure("batch_size", "Requests worked on together.", ROWS)
        self.queue_seconds = self._measure(
            "queue_seconds", "From acceptance to the start of a request's batch.", SECONDS
        )
        self.first_text_seconds = self._measure(
            "first_text_seconds", "From acceptance to the first text of a reply.", SECONDS
        )

    def watch_queue(self, length: Callable[[], float]) -> None:
        """Shows `length()` as the queue's length."""
        gauge = Gauge("relllm_queue_length", "Requests accepted and not yet worked on.", registry=self.registry)
        gauge.set_function(length)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _count(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"relllm_{name}", what, labels, registry=self.registry)

    def _measure(self, name: str, what: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"relllm_{name}", what, labels, buckets=buckets, registry=self.registry)


__all__ = ["Metrics"]
