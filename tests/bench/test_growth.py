"""The growth benchmark runs anywhere and varies what it says."""

from __future__ import annotations

from vlcache_dist.bench.growth import run


def test_growth_on_cpu() -> None:
    report = run("tiny", "cpu", "uniform:2,min=16", 1, sizes=[16, 64], large=64, image=16, max_requests=2)
    assert [row["vision_tokens"] for row in report["by_image"]] == [16, 64]
    for row in report["by_image"]:
        assert row["kv_bytes"] <= row["stored_bytes"] - row["embedding_bytes"] <= 1.02 * row["kv_bytes"] + 512
    assert [row["active_tokens"] for row in report["by_active_tokens"]] == [32, 64, 128]
    assert [row["requests"] for row in report["by_requests"]] == [1, 2]
    assert [row["images"] for row in report["by_images"]] == [1, 2, 4, 8]
    assert all(row["warm_ms"] > 0 for part in ("by_image", "by_requests", "by_images") for row in report[part])
