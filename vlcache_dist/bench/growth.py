"""How the cost of a warm request grows: with the image, with what is recomputed, with requests, and with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_dist.bench.ttft import TEXT_TOKENS, Bench, machine, median
from vlcache_dist.reuse.plan import Plan

ACTIVE = (32, 64, 128, 256, 512, 1024, 2048)
REQUESTS = (1, 2, 4, 8, 16, 32)
IMAGES = (1, 2, 4, 8)


def run(
    shape: str,
    device: str,
    plan: str,
    runs: int,
    *,
    sizes: Sequence[int],
    large: int,
    image: int = 1024,
    max_requests: int = REQUESTS[-1],
) -> dict[str, Any]:
    """Warm milliseconds, medians of ``runs``: by image ``sizes``, by rows that are recomputed of an image of ``large``
    tokens, by requests in a batch and by images in a prompt, each of ``image`` tokens. Beside the first the cold
    request, the floor, and the bytes an image takes in the store."""
    pages = max_requests * (image + 2 * TEXT_TOKENS)  # no more, so that 32B and its largest image fit on one GPU
    bench = Bench(shape, device, max(*sizes, large, max(IMAGES) * image), plan, page_tokens=pages)
    report: dict[str, Any] = {"machine": machine(device), "shape": shape, "plan": plan, "runs": runs}
    report["by_image"] = [_by_image(bench, size, runs) for size in sizes]
    report["by_active_tokens"] = _by_active(bench, large, runs)
    picture = bench.image(image)
    bench.cold_ms(picture)
    report["by_requests"] = [
        {"requests": count, "warm_ms": median(lambda count=count: bench.warm_batch_ms([picture], count), runs)}  # type: ignore[misc]
        for count in REQUESTS
        if count <= max_requests
    ]
    pictures = [bench.image(image) for _ in range(max(IMAGES))]
    for other in pictures:
        bench.cold_ms(other)
    report["by_images"] = [
        {"images": count, "warm_ms": median(lambda count=count: bench.warm_batch_ms(pictures[:count], 1), runs)}  # type: ignore[misc]
        for count in IMAGES
    ]
    return report


def _by_image(bench: Bench, size: int, runs: int) -> dict[str, Any]:
    image = bench.image(size)

    def cold() -> float:
        image.key = bench.rng.bytes(32)
        return bench.cold_ms(image)

    before = bench.store.stats()
    cold()
    after = bench.store.stats()
    stored = None
    if after.num_evictions == before.num_evictions:
        stored = (after.committed - before.committed) * bench.layout.itemsize
    cold_ms = median(cold, max(3, runs // 2))
    return {
        "vision_tokens": image.tokens,
        "cold_ms": cold_ms,
        "warm_ms": median(lambda: bench.warm_ms(image), runs),
        "warm_floor_ms": bench.floor_ms(image, runs),
        "kv_bytes": bench.layout.kv_elements(image.tokens) * bench.layout.itemsize,
        "embedding_bytes": bench.layout.embedding_elements(image.tokens) * bench.layout.itemsize,
        "stored_bytes": stored,  # what the store gave for both; None if others had to go
    }


def _by_active(bench: Bench, size: int, runs: int) -> list[dict[str, Any]]:
    """Half of few rows are text, which is always computed."""
    image, plan, text, rows = bench.image(size), bench.plan, bench.text_tokens, []
    bench.cold_ms(image)
    for active in ACTIVE:
        bench.text_tokens = min(text, active // 2)
        recomputed = active - bench.text_tokens
        if recomputed > image.tokens:
            continue
        bench.plan = Plan.parse(f"uniform:0,min={recomputed}")
        rows.append(
            {
                "vision_tokens": image.tokens,
                "active_tokens": active,
                "warm_ms": median(lambda: bench.warm_ms(image), runs),
                "warm_floor_ms": bench.floor_ms(image, runs),
            }
        )
    bench.plan, bench.text_tokens = plan, text
    return rows
