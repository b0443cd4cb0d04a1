"""Start the whole application, on this machine or on a running Ray cluster, and take it down again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import httpx
import ray
from ray import serve

from vlcache_dist.cache_directory.actor import shutdown_directory
from vlcache_dist.config import Settings
from vlcache_dist.errors import ConfigError, WorkerLost
from vlcache_dist.serve.app import build

log = logging.getLogger(__name__)

LOGICAL_CPUS = 16  #: of a cluster started here: actors ask for none, Serve's own do


@contextlib.contextmanager
def running(settings: Settings, *, ready_s: float = 180.0, say: Callable[[str], None] = log.info) -> Iterator[str]:
    """The application, from ready to gone: yields its base URL (``http://host:port``).

    Starts a Ray cluster on this machine unless ``settings.serve.address`` names one. Whatever happens inside, SIGINT
    and SIGTERM included, everything that was started here is stopped; a cluster that was joined keeps running without
    the application. Raises WorkerLost if the pools are not ready in time, ConfigError if the port is taken.
    """
    own = settings.serve
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _terminate_as_interrupt() as again:
        try:
            say("starting Ray" if own.address is None else f"joining Ray at {own.address}")
            port = _start_ray(settings)
            again()  # Ray has put a handler of its own in place, which aborts the process after 3 s
            say(f"starting {own.encoders} encoder, {own.prefills} prefill and {own.decodes} decode workers")
            serve.start(http_options={"host": own.host, "port": port}, logging_config={"enable_access_log": False})
            serve.run(build(settings.model_dump(mode="json")), name=own.app_name, blocking=False)
            url = f"http://{'127.0.0.1' if own.host in ('0.0.0.0', '::') else own.host}:{port}"
            _wait_until_ready(url, settings, ready_s, say)
            yield url
        finally:
            with _uninterrupted():
                say("stopping")
                _stop(settings)


def _start_ray(settings: Settings) -> int:
    own = settings.serve
    port = own.port or _free_port(own.host)
    if own.port and own.address is None and not _is_free(own.host, own.port):
        raise ConfigError(f"port {own.port} of {own.host} is taken: choose another with --port")
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    if own.address is None:
        ray.init(num_cpus=LOGICAL_CPUS, include_dashboard=False, **quiet)  # type: ignore[arg-type]
        return port
    _check_reachable(own.address)
    try:
        ray.init(address=own.address, **quiet)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the Ray cluster at {own.address} cannot be joined: {str(error).splitlines()[0]} (is it running, and does "
            "this process have its token, by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH?)"
        ) from error
    return port


def _wait_until_ready(url: str, settings: Settings, ready_s: float, say: Callable[[str], None]) -> None:
    """Until every worker of every pool has joined the directory."""
    own = settings.serve
    wanted = {"encoder": own.encoders, "prefill": own.prefills, "decode": own.decodes}
    if not own.decodes:
        wanted = {"encoder": own.encoders, "colocated": own.prefills}
    deadline = time.monotonic() + ready_s
    seen: dict[str, int] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            reply = httpx.get(f"{url}/healthz", timeout=5.0)
            workers = reply.json().get("workers", {}) if reply.status_code == 200 else {}
            if workers != seen:
                seen = workers
                say(f"ready: {', '.join(f'{n} {role}' for role, n in sorted(seen.items())) or 'nobody yet'}")
            if all(seen.get(role, 0) >= count for role, count in wanted.items()):
                return
        time.sleep(0.1)
    raise WorkerLost(f"after {ready_s:.0f} s the pools have {seen}, not {wanted}")


def _stop(settings: Settings) -> None:
    own = settings.serve
    if not ray.is_initialized():
        return
    try:
        serve.delete(own.app_name)
        shutdown_directory(own.app_name, own.directory_shards)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ConfigError at once, where Ray would try for more than a minute."""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdigit():
        return  # "auto" and the like are Ray's to resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError as error:
        raise ConfigError(f"nothing answers at {address}, where the Ray cluster should be: {error}") from error


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[Callable[[], None]]:
    """SIGTERM unwinds the stack as Ctrl-C does; yields a function that takes the signal over once more."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # the caller has its own way to stop
        yield lambda: None
        return

    def again() -> None:
        signal.signal(signal.SIGTERM, interrupt)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield again
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the cluster behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
