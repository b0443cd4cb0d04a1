"""Traces: which request showed which pictures, and when. Planned from a scenario, or recorded in a load test. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vlcache_dist.errors import ConfigError
from vlcache_dist.loadtest import arrivals, scenario
from vlcache_dist.loadtest.records import Run
from vlcache_dist.loadtest.scenario import Scenario

TOKENS_PER_WORD = 1.3  #: of English text, about
FRAME_TOKENS = 24  #: chat template, question


class Shown(msgspec.Struct, frozen=True):
    """A picture in a prompt: an opaque name, equal for equal pictures of one tenant, and its vision tokens."""

    picture: str
    tokens: int


class Arrival(msgspec.Struct, frozen=True):
    """A request, ``at_s`` seconds after the trace began."""

    at_s: float
    text_tokens: int
    images: tuple[Shown, ...]


class Trace(msgspec.Struct, frozen=True):
    """``source``: where it comes from, in words."""

    name: str
    source: str
    arrivals: list[Arrival]

    @classmethod
    def planned(cls, each: Scenario, rate: float, share: float, count: int, seed: int) -> Trace:
        """Poisson arrivals at ``rate`` per second; about ``share`` of the image slots are repeated. Raises
        ConfigError."""
        requests = scenario.plan(each, share, count, seed)
        words = round(each.preamble_words * TOKENS_PER_WORD) + FRAME_TOKENS
        made = []
        for at_s, request in zip(arrivals.schedule(count, rate, seed), requests, strict=True):
            images = tuple(Shown(f"{request.tenant}/{p.seed}", p.rows * p.columns) for p in request.images)
            made.append(Arrival(at_s, words + FRAME_TOKENS * (len(request.turns) - 1), images))
        return cls(each.name, f"planned: {rate:g}/s, {share:.0%} repeated, seed {seed}", made)

    @classmethod
    def recorded(cls, run: Run) -> list[Trace]:
        """What a load test sent: one trace per point, from its arm with reuse (the other one sent the same)."""
        traces = []
        for point in run.points:
            records = sorted(point.arms[-1].records, key=lambda record: record.sent_s)
            made = []
            for record in records:
                images = tuple(
                    Shown(f"{record.tenant}/{image['digest']}", image["vision_tokens"]) for image in record.images
                )
                if record.status == "answered":
                    vision = sum(image.tokens for image in images)
                    made.append(Arrival(record.sent_s, record.prompt_tokens - vision, images))
            source = f"recorded: {run.host}, {run.started}, {point.rate:g}/s, {point.repeated:.0%} repeated"
            traces.append(cls(point.scenario, source, made))
        return traces

    def scaled(self, rate: float) -> Trace:
        """The same requests at another mean rate per second. Raises ConfigError for a rate that is not positive."""
        if rate <= 0:
            raise ConfigError(f"rate = {rate}: requests per second must be positive")
        first, last = self.arrivals[0].at_s, self.arrivals[-1].at_s
        stretch = (len(self.arrivals) - 1) / rate / (last - first) if last > first else 1.0
        moved = [msgspec.structs.replace(a, at_s=(a.at_s - first) * stretch) for a in self.arrivals]
        return Trace(self.name, f"{self.source}; played at {rate:g}/s", moved)

    def enlarged(self, factor: int) -> Trace:
        """The same requests with pictures of ``factor`` times as many tokens."""
        moved = [
            msgspec.structs.replace(a, images=tuple(Shown(image.picture, image.tokens * factor) for image in a.images))
            for a in self.arrivals
        ]
        return Trace(self.name, f"{self.source}; pictures x {factor}", moved)


def read(path: Path) -> list[Trace]:
    """Traces from a file: what ``write`` wrote, or a load test's ``result.json``. Raises ConfigError."""
    try:
        data = path.read_bytes()
        try:
            traces = msgspec.json.decode(data, type=list[Trace])
        except msgspec.ValidationError:
            traces = Trace.recorded(msgspec.json.decode(data, type=Run))
    except OSError as error:
        raise ConfigError(f"cannot read a trace from {path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is neither a trace nor a load test's result: {error}") from error
    if not traces or any(not trace.arrivals for trace in traces):
        raise ConfigError(f"{path} has a trace without requests")
    return traces


def write(path: Path, traces: Sequence[Trace]) -> None:
    path.write_bytes(msgspec.json.encode(list(traces)) + b"\n")
