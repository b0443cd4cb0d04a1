"""What the reports of ``bench.parts`` must say, and what they say: met, missed, or not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = dict[str, Any]
SIZES = (1024, 4096, 16384)
ENGINE, VLLM, COMPILED = "ttft-7b-{gpu}", "vllm-7b-{gpu}", "vllm-7b-{gpu}-compiled"
KERNELS, REMOTE, HTTP = "kernels-{gpu}", "ttft-remote-7b-{gpu}", "http-ttft-7b-2x{gpu}"
SECOND_TOKEN_MS, OVER_HTTP_MS = 3.0, 8.0
SLOWER_THAN_BEST = 1.3


@dataclass(frozen=True, slots=True)
class Target:
    """``files``: stems of the reports that ``value`` takes, in order. ``value`` returns None, or raises LookupError,
    where they lack it. ``at_most``: else at least ``bound``."""

    what: str
    bound: float
    at_most: bool
    files: tuple[str, ...]
    value: Callable[..., float | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``measured`` None: not measured."""

    what: str
    bound: float
    at_most: bool
    measured: float | None

    @property
    def state(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured <= self.bound if self.at_most else self.measured >= self.bound
        return "met" if met else "missed"


def verdicts(folder: Path, gpu: str) -> list[Verdict]:
    """All targets against the reports in ``folder``."""
    return [Verdict(t.what, t.bound, t.at_most, _measured(t, folder, gpu)) for t in TARGETS]


def _measured(target: Target, folder: Path, gpu: str) -> float | None:
    reports = []
    for stem in target.files:
        file = folder / f"{stem.format(gpu=gpu)}.json"
        if not file.exists():
            return None
        reports.append(json.loads(file.read_text()))
    try:
        return target.value(*reports)
    except LookupError:
        return None


def table(found: list[Verdict]) -> str:
    """Markdown."""
    lines = ["| | target | measured | |", "|---|---|---|---|"]
    for verdict in found:
        measured = "" if verdict.measured is None else f"{verdict.measured:.4g}"
        sign = "<=" if verdict.at_most else ">="
        lines.append(f"| {verdict.what} | {sign} {verdict.bound:g} | {measured} | {verdict.state} |")
    return "\n".join(lines)


# -- what to look up ----------------------------------------------------------------------------------------------


def _row(report: Report, **wanted: Any) -> Report:
    """The first row that has these values. Raises LookupError if there is none."""
    for row in report["rows"]:
        if all(row.get(key) == value for key, value in wanted.items()):
            return dict(row)
    raise LookupError(wanted)


def _field(name: str, tokens: int) -> Callable[[Report], float]:
    return lambda report: float(_row(report, vision_tokens=tokens)[name])


def _ahead(ours: str, theirs: str, tokens: int) -> Callable[[Report, Report], float]:
    def value(engine: Report, other: Report) -> float:
        return float(_row(other, vision_tokens=tokens)[theirs] / _row(engine, vision_tokens=tokens)[ours])

    return value


def _share_of_copy(kernel: str, shape: str) -> Callable[[Report], float]:
    return lambda report: float(_row(report, kernel=kernel, shape=shape)["of_copy"])


def _attention(queries: int) -> str:
    return f"{queries} queries over 16384 keys"


def _slower_than_best(queries: int) -> Callable[[Report], float]:
    def value(report: Report) -> float:
        rows = [r for r in report["rows"] if r["kernel"] == "segment_attention" and r["shape"] == _attention(queries)]
        return float(_row({"rows": rows}, backend="auto")["us"] / min(r["us"] for r in rows))

    return value


def _decode(name: str, batch: int) -> Callable[[Report], float]:
    return lambda report: float(_row({"rows": report["decode"]}, batch=batch)[name])


def _stored(report: Report) -> float:
    rows = [r for r in report["by_image"] if r["stored_bytes"] is not None]
    if not rows:
        raise LookupError("the store was too small")
    return max(float((r["stored_bytes"] - r["embedding_bytes"]) / r["kv_bytes"]) for r in rows)


def _large_reads(report: Report) -> float | None:
    shares = [float(r["share"]) for r in report["rows"] if r["bytes"] >= 256 << 20]
    return min(shares) if shares else None


def _over_http(http: Report, engine: Report) -> float:
    row = _row(http, layout="disaggregated", vision_tokens=4096, kind="local")
    return float(row["ttft_ms"] - _row(engine, vision_tokens=4096)["warm_ms"])


def _second_token(http: Report) -> float:
    row = _row(http, layout="disaggregated", vision_tokens=16384, kind="local")
    return float(row["second_ms"] - row["itl_ms"])


def _hands_over(http: Report) -> float:
    kinds = (_row(http, layout="disaggregated", vision_tokens=16384, kind=kind) for kind in ("local", "off"))
    local, whole = (float(row["handoff_bytes"]) for row in kinds)
    return local / whole


def _targets() -> Iterator[Target]:
    engine = (ENGINE,)
    for n, warm, cold, tower in zip(SIZES, (6.5, 7.5, 13), (45, 150, 760), (16, 60, 350), strict=True):
        yield Target(f"warm TTFT, {n:,} vision tokens, ms", warm, True, engine, _field("warm_ms", n))
        yield Target(
            f"warm over its floor, {n:,}", 1.2, True, (ENGINE, ENGINE),
            lambda a, b, n=n: 1 / _ahead("warm_ms", "warm_floor_ms", n)(a, b),
        )  # fmt: skip
        yield Target(f"cold TTFT, {n:,}, ms", cold, True, engine, _field("cold_ms", n))
        yield Target(
            f"cold, ahead of transformers, {n:,}", 3, False, (ENGINE, ENGINE), _ahead("cold_ms", "transformers_ms", n)
        )
        yield Target(f"vision tower alone, {n:,}, ms", tower, True, engine, _field("vision_tower_ms", n))
    for n, times in zip(SIZES, (3.7, 11, 29), strict=True):
        for name, stem in (("vLLM", VLLM), ("compiled vLLM", COMPILED)):
            both = (ENGINE, stem)
            yield Target(f"cold, ahead of {name}, {n:,}", 1, False, both, _ahead("cold_ms", "cold_engine_ms", n))
            yield Target(
                f"warm, ahead of {name} with the same image, {n:,}", times, False, both,
                _ahead("warm_ms", "same_image_engine_ms", n),
            )  # fmt: skip
            yield Target(
                f"warm, ahead of {name}'s exact prefix, {n:,}", 1, False, both,
                _ahead("warm_ms", "exact_prefix_engine_ms", n),
            )  # fmt: skip
    kernels = (KERNELS,)
    for name in ("rotate_scatter", "pack_rows", "unpack_rows"):
        yield Target(f"{name}, 16,384 tokens, of copy", 0.75, False, kernels, _share_of_copy(name, "16384 tokens"))
    one = _share_of_copy("segment_attention", _attention(1))
    yield Target("attention, 1 query over 16,384 keys, of copy", 0.7, False, kernels, one)
    for queries, tera in ((64, 200), (256, 300)):
        yield Target(
            f"attention, {queries} queries, TFLOP/s", tera, False, kernels,
            lambda r, q=queries: float(
                _row(r, kernel="segment_attention", shape=_attention(q), backend="auto")["tflop_s"]
            ),
        )  # fmt: skip
    for queries in (1, 64, 256):
        what = f"attention, {queries} queries, times the best backend"
        yield Target(what, SLOWER_THAN_BEST, True, kernels, _slower_than_best(queries))
    yield Target("decode, batch 1, of copy bandwidth", 0.8, False, engine, _decode("of_copy_bandwidth", 1))
    yield Target("decode, batch 64, tokens/s", 8000, False, engine, _decode("tokens_per_s", 64))
    yield Target("load from the page cache, s", 6, True, ("end-to-end-7b-{gpu}",), lambda r: max(r["load_s"]))
    yield Target("stored, over the KV's bytes", 1.02, True, ("growth-7b-{gpu}",), _stored)
    yield Target("steps over by 100 ms after start", 0, True, ("stalls-7b-{gpu}",), lambda r: float(r["stalls"]))
    yield Target("READ of 256 MiB and more, of a peer copy", 0.75, False, ("transfer-7b-{gpu}",), _large_reads)
    yield Target("READ of 92 MB, ms", 0.6, True, ("transfer-7b-{gpu}",), lambda r: float(r["image"]["median_us"]) / 1e3)
    fetched = "READ of 92 MB, from lease to admission, ms"
    yield Target(fetched, 0.6, True, (REMOTE,), _field("fetch_ms", 1600))
    for n, ratio in zip(SIZES, (1.15, 1.08, 1.08), strict=True):
        yield Target(f"remote warm over local, {n:,}", ratio, True, (REMOTE,), _field("ratio", n))
    yield Target("transfer hidden behind compute, 16,384", 0.7, False, (REMOTE,), _field("hidden", 16384))
    yield Target("warm over HTTP above the engine, 4,096, ms", OVER_HTTP_MS, True, (HTTP, ENGINE), _over_http)
    yield Target("handoff, of all KV, 16,384", 0.025, True, (HTTP,), _hands_over)
    yield Target("second token delayed by the handoff, ms", SECOND_TOKEN_MS, True, (HTTP,), _second_token)


TARGETS = tuple(_targets())
