"""What /metrics tells Prometheus. In: what requests report, and the engine's own counters when it is scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fireflyer.infer.stats import EngineStats

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """One server's metrics, in a registry of their own, so that two servers in a process don't meet."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "fireflyer_requests", "Requests by how they ended", ["endpoint", "outcome"], registry=self._registry
        )
        self.first_token = _histogram(self._registry, "time_to_first_token", _FIRST_TOKEN_BUCKETS)
        self.inter_token = _histogram(self._registry, "inter_token", _INTER_TOKEN_BUCKETS)
        self.request = _histogram(self._registry, "request", _REQUEST_BUCKETS)
        self._registry.register(_EngineCollector(stats))

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _histogram(registry: CollectorRegistry, name: str, buckets: tuple[float, ...]) -> Histogram:
    full_name = f"fireflyer_{name}_seconds"
    return Histogram(full_name, name.replace("_", " ").capitalize(), buckets=buckets, registry=registry)


class _EngineCollector(Collector):
    """The engine's counters, read when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("fireflyer_answers_running", "Answers being written", stats.running)
        yield GaugeMetricFamily("fireflyer_answers_waiting", "Answers waiting for a place", stats.waiting)
        blocks = GaugeMetricFamily("fireflyer_cache_blocks", "Blocks of the latent cache", labels=["state"])
        blocks.add_metric(["used"], stats.blocks_used)
        blocks.add_metric(["cached"], stats.blocks_cached)
        blocks.add_metric(["free"], stats.blocks_total - stats.blocks_used - stats.blocks_cached)
        yield blocks
        yield GaugeMetricFamily("fireflyer_expert_bytes", "Routed experts in bounded memory", stats.expert_bytes)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
            ("generated_tokens", "Tokens written", stats.generated_tokens),
            ("prefix_hit_tokens", "Prompt tokens whose latents were still there", stats.prefix_hit_tokens),
            ("preemptions", "Answers that lost their place and were computed again", stats.preemptions),
            ("drafted_tokens", "Tokens that MTP guessed", stats.drafted_tokens),
            ("accepted_tokens", "Guesses that were right", stats.accepted_tokens),
            ("expert_hits", "Uses of a routed expert that was in bounded memory", stats.expert_hits),
            ("expert_misses", "Uses of a routed expert that had to be read", stats.expert_misses),
            ("steps", "Steps of the engine", stats.steps),
            ("step_seconds", "Time in steps", stats.step_s),
            ("model_seconds", "Time of the decoder in steps", stats.model_s),
        ):
            yield CounterMetricFamily(f"fireflyer_{name}", text, value)
