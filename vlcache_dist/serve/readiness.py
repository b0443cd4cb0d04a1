"""Whether the pools can be placed, and when they are there: what a start that does not succeed is told apart by."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from vlcache_dist.config import ServeSettings
from vlcache_dist.errors import ConfigError, WorkerLost

EPSILON = 1e-6
POLL_S, FAILURES_S = 0.1, 1.0  #: of the pools' health, and of deployments that fail, while a start is awaited
ERROR_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception|Lost|Model))(?:: (.*))?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pool:
    """What one pool asks Ray for. ``role`` as the directory counts it; ``gpus`` for each of a worker's ``ranks``."""

    role: str
    workers: int
    gpus: float
    resource: str | None
    ranks: int = 1


def pool_resource(role: str) -> str:
    """The custom Ray resource of a pool's nodes (``serve.pool_resources``)."""
    return f"{role}_pool"


def pools(settings: ServeSettings, tensor_parallel: int = 1) -> list[Pool]:
    """The pools that ``settings`` describe; ``tensor_parallel`` ranks to a worker with a language model."""

    def pool(deployed: str, role: str, workers: int, ranks: int) -> Pool:
        resource = pool_resource(deployed) if settings.pool_resources else None
        return Pool(role, workers, settings.gpus_per_worker, resource, ranks)

    prefill = pool("prefill", "prefill" if settings.decodes else "colocated", settings.prefills, tensor_parallel)
    decode = [pool("decode", "decode", settings.decodes, tensor_parallel)] if settings.decodes else []
    return [pool("encoder", "encoder", settings.encoders, 1), prefill, *decode]


def require_room(settings: ServeSettings, nodes: Sequence[Mapping[str, float]], tensor_parallel: int = 1) -> None:
    """Raises ConfigError, which names the pool and what is missing, if ``nodes`` (their total resources) cannot hold
    all workers. A worker's GPUs, those of all its ranks, lie on one node."""
    wanted = pools(settings, tensor_parallel)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    for pool in wanted:
        if pool.resource is not None and (offered := sum(node.get(pool.resource, 0) for node in nodes)) < pool.workers:
            raise ConfigError(
                f"the {pool.role} pool wants {pool.workers} workers, but the cluster's nodes offer {offered:g} of the "
                f"resource {pool.resource}: start nodes with it, or turn serve.pool_resources off"
            )
    each = settings.gpus_per_worker
    if not each:
        return
    workers = sum(pool.workers for pool in wanted)
    room = _placed(wanted, [_ranks_on(node.get("GPU", 0.0), each) for node in nodes])
    if room < workers:
        asked = ", ".join(
            f"{pool.workers} {pool.role}" + (f" of {pool.ranks} ranks" if pool.ranks > 1 else "") for pool in wanted
        )
        need = sum(pool.workers * pool.ranks for pool in wanted) * each
        raise ConfigError(
            f"{asked} workers with {each:g} GPU each need {need:g} GPUs, but the cluster has {gpus:g}, which "
            f"hold {room} of {workers}: take fewer workers or lower serve.gpus_per_worker"
        )


def _placed(wanted: Sequence[Pool], nodes: Sequence[int]) -> int:
    """How many workers find a node with room for all their ranks, the largest first, each where least is left over."""
    free, placed = list(nodes), 0
    for ranks in sorted((pool.ranks for pool in wanted for _ in range(pool.workers)), reverse=True):
        fitting = [count for count in free if count >= ranks]
        if fitting:
            free[free.index(min(fitting))] -= ranks
            placed += 1
    return placed


def _ranks_on(gpus: float, each: float) -> int:
    if each >= 1:
        return int(gpus / each + EPSILON)
    return int(gpus) * int(1 / each + EPSILON)


def use_token() -> None:
    """To be called before Ray is imported: a cluster that somebody started wants its token by default, and Ray sends it
    only if told so by then."""
    if Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def start_with_token() -> None:
    """To be called before Ray is imported: a cluster that is started here asks for a token, which is Ray's default;
    named, it is not talked about."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_reachable(address: str) -> None:
    """Raises ConfigError at once if nothing listens at a Ray address, where Ray would try for more than a minute."""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdigit():
        return  # "auto" and the like are Ray's to resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError as error:
        raise ConfigError(f"nothing answers at {address}, where the Ray cluster should be: {error}") from error


def wait_until_ready(
    url: str,
    settings: ServeSettings,
    patience_s: float,
    *,
    failures: Callable[[], Mapping[str, str]],
    room: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Until every worker of every pool has joined the directory.

    ``failures``: messages of deployments that failed or keep failing, by name; ``room`` raises ConfigError if the
    cluster lacks resources. Raises WorkerLost or ConfigError as soon as a worker cannot start, or after ``patience_s``.
    """
    wanted = {pool.role: pool.workers for pool in pools(settings)}
    deadline = time.monotonic() + patience_s
    seen: dict[str, int] = {}
    look_again = 0.0
    # One client, because making it costs more than a request; a proxy from the environment is not for this endpoint.
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                reply = client.get("/healthz")
                workers = reply.json().get("workers", {}) if reply.status_code == 200 else {}
                if workers != seen:
                    seen = workers
                    say(f"ready: {', '.join(f'{n} {role}' for role, n in sorted(seen.items())) or 'nobody yet'}")
                if all(seen.get(role, 0) >= count for role, count in wanted.items()):
                    return
            if time.monotonic() > look_again:
                for name, message in failures().items():
                    raise WorkerLost(f"{name} cannot start: {last_error(message)}")
                look_again = time.monotonic() + FAILURES_S
            time.sleep(POLL_S)
    room()
    raise WorkerLost(f"after {patience_s:.0f} s the pools have {seen}, not {wanted}")


def failing(name: str, status: str, message: str, deployments: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Messages of what Serve has tried to start in vain: of deployments, given as (status, message) by name, or else of
    the application ``name`` itself."""
    found = {
        deployed: why
        for deployed, (how, why) in deployments.items()
        if how in ("DEPLOY_FAILED", "UNHEALTHY") or "Traceback" in why
    }
    return found or ({name: message} if status == "DEPLOY_FAILED" else {})


def last_error(message: str) -> str:
    """The error that a deployment's message, with a traceback in it, is about, in one line."""
    found = ERROR_LINE.findall(message)
    if found:
        kind, text = found[-1]
        return f"{kind}: {text}" if text else kind
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else "no reason was given"
