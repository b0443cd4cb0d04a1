"""Every metric the server exports, declared in one place.

A ``Metrics`` owns its registry, so that two servers in one process (tests) do not share numbers.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Prometheus metrics of one ingress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vlcache_requests_total", "Finished requests by HTTP status", ["status"], registry=self.registry
        )
        self.running = Gauge("vlcache_requests_running", "Requests under way", registry=self.registry)
        self.ttft = Histogram(
            "vlcache_time_to_first_token_seconds",
            "From complete body to first event of the answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("vlcache_prompt_tokens_total", "Prompt tokens", registry=self.registry)
        self.cached_tokens = Counter(
            "vlcache_cached_tokens_total", "Prompt tokens that were not computed in full", registry=self.registry
        )
        self.completion_tokens = Counter("vlcache_completion_tokens_total", "Answer tokens", registry=self.registry)
        self.vision_tokens = Counter(
            "vlcache_vision_tokens_total", "Vision tokens by source of their KV", ["source"], registry=self.registry
        )
        self.recomputed_tokens = Counter(
            "vlcache_recomputed_vision_tokens_total", "Vision tokens recomputed on a hit", registry=self.registry
        )
        self.bytes_moved = Counter(
            "vlcache_image_bytes_moved_total", "Bytes of image KV moved between workers", registry=self.registry
        )

    def finished(self, prompt: int, cached: int, completion: int, vlcache: dict[str, Any]) -> None:
        """Count an answered request; ``vlcache`` is its response extension."""
        self.prompt_tokens.inc(prompt)
        self.cached_tokens.inc(cached)
        self.completion_tokens.inc(completion)
        for image in vlcache.get("images", ()):
            self.vision_tokens.labels(image["source"]).inc(image["vision_tokens"])
            self.recomputed_tokens.inc(image["recomputed_tokens"])
            self.bytes_moved.inc(image["bytes_moved"])

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
