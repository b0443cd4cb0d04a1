"""Start the whole application, on this machine or on a running Ray cluster, and take it down again."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from vlcache_dist.assembly import Model, require_device, require_memory
from vlcache_dist.cache_directory.actor import shutdown_directory
from vlcache_dist.config import ServeSettings, Settings
from vlcache_dist.errors import ConfigError
from vlcache_dist.interrupts import terminate_as_interrupt, uninterrupted
from vlcache_dist.leftovers import end, marked
from vlcache_dist.model.weights import BUNDLED
from vlcache_dist.pixels import PixelConfig
from vlcache_dist.reuse.guarded import GUARDED
from vlcache_dist.reuse.plan_file import resolve_plan
from vlcache_dist.serve.app import build
from vlcache_dist.serve.endpoint import check_endpoint, choose_port, url_of
from vlcache_dist.serve.readiness import check_reachable, failing, require_room, wait_until_ready
from vlcache_dist.types import Role

log = logging.getLogger(__name__)

MARK = "VLCACHE_CLUSTER"  #: in the environment of all processes of a cluster started here
STOP_S = 60.0
DEATH_S = 0.5  #: within it the control store of a cluster started here has followed a signal to the whole process group
LOGICAL_CPUS = 16  #: of a cluster started here: actors ask for none, Serve's own do


@contextlib.contextmanager
def running(settings: Settings, *, ready_s: float = 180.0, say: Callable[[str], None] = log.info) -> Iterator[str]:
    """The application, from ready to gone: yields its base URL (``http://host:port``).

    Starts a Ray cluster on this machine unless ``settings.serve.address`` names one. Whatever happens inside, SIGINT
    and SIGTERM included, everything that was started here is stopped; a cluster that was joined keeps running without
    the application. Raises CheckpointError for a model that is not there, InvalidPlan, WorkerLost if a worker cannot
    start or the pools are not ready in time, ConfigError if the port is taken, the device not there, the cluster too
    small, or the endpoint open to others without API keys.
    """
    own = settings.serve
    check_endpoint(own)
    port = choose_port(own)
    if own.address is None:
        say(f"opening {settings.model.model}")
        _check_model(settings)
    if settings.engine.plan == GUARDED and settings.model.model != BUNDLED:
        say(f"plan {GUARDED}: its limits were measured on {BUNDLED!r}; `vlcache-dist calibrate` measures this model")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    mark = secrets.token_hex(8)
    with terminate_as_interrupt() as again:
        try:
            say("starting Ray" if own.address is None else f"joining Ray at {own.address}")
            _start_ray(own, mark)
            again()  # Ray has put a handler of its own in place, which aborts the process after 3 s
            say(f"starting {own.encoders} encoder, {own.prefills} prefill and {own.decodes} decode workers")
            if own.address is None:  # a cluster that was joined may grow
                require_room(own, _node_resources(), settings.engine.tensor_parallel)
            serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
            listening = settings.model_copy(update={"serve": own.model_copy(update={"direct": True, "port": port})})
            target = serve.RunTarget(target=build(listening.model_dump(mode="json")), name=own.app_name)
            serve.run_many([target], wait_for_applications_running=False)
            url = url_of(own.host, port)
            wait_until_ready(
                url,
                own,
                ready_s,
                failures=lambda: _failures(own.app_name),
                room=lambda: require_room(own, _node_resources(), settings.engine.tensor_parallel),
                say=say,
            )
            yield url
        finally:
            with uninterrupted():
                say("stopping")
                _stop(own, mark)


def _check_model(settings: Settings) -> None:
    """What every worker would stumble over later, and a hub that is out of reach. Raises CheckpointError,
    UnsupportedModel, ConfigError, InvalidPlan."""
    model = Model.open(settings)
    require_device(model)
    PixelConfig.read(model.checkpoint.folder)
    resolve_plan(settings.engine.plan, model=model.layout.model, num_layers=model.layout.num_layers)
    if model.placement.device.type == "cpu":  # asking a GPU would take a part of its memory
        for role in (Role.ENCODER, Role.PREFILL):
            require_memory(settings, role, model)


def _start_ray(own: ServeSettings, mark: str) -> None:
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    if own.address is None:
        os.environ[MARK] = mark
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets everything else on the machine go first
        try:
            # "local": a cluster that somebody else runs on this machine is not to be joined unasked.
            ray.init("local", num_cpus=LOGICAL_CPUS, include_dashboard=False, **quiet)  # type: ignore[arg-type]
        finally:
            del os.environ[MARK]
        return
    check_reachable(own.address)
    try:
        ray.init(address=own.address, **quiet)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the Ray cluster at {own.address} cannot be joined: {str(error).splitlines()[0]} (is it running, and does "
            "this process have its token, by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH?)"
        ) from error


def _failures(app_name: str) -> dict[str, str]:
    """Messages of the application's deployments that Serve has tried to start in vain, by name."""
    application = serve.status().applications.get(app_name)
    if application is None:
        return {}
    deployments = {name: (about.status, about.message) for name, about in application.deployments.items()}
    return failing(app_name, application.status, application.message, deployments)


def _node_resources() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _stop(settings: ServeSettings, mark: str) -> None:
    """Take down the application, and the cluster with ``mark`` if it was started here."""
    if ray.is_initialized():
        control_store = ray.get_runtime_context().gcs_address
        if settings.address is None:
            time.sleep(DEATH_S)
        thread = threading.Thread(target=_take_down, args=(settings,), daemon=True)
        deadline = time.monotonic() + STOP_S
        if _answers(control_store):
            thread.start()
        while thread.is_alive() and time.monotonic() < deadline and _answers(control_store):
            thread.join(0.5)
        if not _answers(control_store):
            log.warning("Ray's control store is gone; its processes are ended without it")
            end(lambda: marked(MARK, mark), patience_s=2.0)
        ray.shutdown()
    if settings.address is None:
        end(lambda: marked(MARK, mark))


def _take_down(settings: ServeSettings) -> None:
    try:
        with contextlib.suppress(RayServeException):  # Serve was not started yet
            serve.delete(settings.app_name)
        shutdown_directory(settings.app_name, settings.directory_shards)
    except ray.exceptions.RayError as error:
        log.warning("the application did not end as it should: %s", str(error).splitlines()[0])


def _answers(address: str) -> bool:
    """Whether Ray's control store is there. A signal to the whole process group ends it as well, and Ray would wait for
    it for a minute and then abort."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True
