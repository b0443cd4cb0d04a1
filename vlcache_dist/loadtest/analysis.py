"""Records to figures. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlcache_dist.loadtest.records import Objective, Record, Summary
from vlcache_dist.types import KVSource


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed (nearest rank); 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def cdf(values: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share of values not above it), ascending."""
    ordered = sorted(values)
    return [(value, (rank + 1) / len(ordered)) for rank, value in enumerate(ordered)]


def is_good(record: Record, objective: Objective) -> bool:
    """Whether an answer kept the objective. An answer of one piece has no gaps and keeps theirs."""
    return (
        record.status == "answered" and record.ttft_ms <= objective.ttft_ms and record.itl_mean_ms <= objective.itl_ms
    )


def summarize(records: Sequence[Record], objective: Objective) -> Summary:
    """Figures of one measurement. Its duration reaches from the first scheduled time to the last answer's end."""
    answered = [record for record in records if record.status == "answered"]
    begins = min((record.scheduled_s for record in records), default=0.0)
    ends = max((record.scheduled_s + record.total_ms / 1e3 for record in records), default=0.0)
    duration = max(ends - begins, 1e-9)
    ttft = [record.ttft_ms for record in answered]
    itl = [gap for record in answered for gap in record.itl_ms]
    images = [image for record in answered for image in record.images]
    tokens = {source.value: 0 for source in KVSource}
    for image in images:
        tokens[image["source"]] += image["vision_tokens"]
    vision = sum(tokens.values())
    prompt = sum(record.prompt_tokens for record in answered)
    return Summary(
        sent=len(records),
        answered=len(answered),
        refused=sum(record.status == "refused" for record in records),
        failed=sum(record.status == "failed" for record in records),
        duration_s=round(duration, 3),
        ttft_p50=percentile(ttft, 0.5),
        ttft_p90=percentile(ttft, 0.9),
        ttft_p99=percentile(ttft, 0.99),
        itl_p50=percentile(itl, 0.5),
        itl_p99=percentile(itl, 0.99),
        goodput=round(sum(is_good(record, objective) for record in records) / duration, 3),
        right=_share(sum(record.answer == record.expected for record in answered), len(answered)),
        tokens=tokens,
        hit_share=_share(vision - tokens[KVSource.COMPUTED.value], vision),
        recompute_share=_share(sum(image["recomputed_tokens"] for image in images), vision),
        cached_share=_share(sum(record.cached_tokens for record in answered), prompt),
        bytes_fetched=sum(image["bytes_moved"] for image in images),
        bytes_handed_over=sum(record.handoff_bytes for record in answered),
        late_p99_ms=round(percentile([(record.sent_s - record.scheduled_s) * 1e3 for record in records], 0.99), 3),
    )


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
