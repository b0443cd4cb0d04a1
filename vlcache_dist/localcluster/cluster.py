"""Ray on every host, the application across them from a Serve config file, and all of it down again."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from vlcache_dist.config import ServeSettings, Settings
from vlcache_dist.errors import ConfigError, WorkerLost
from vlcache_dist.interrupts import terminate_as_interrupt, uninterrupted
from vlcache_dist.leftovers import end, marked
from vlcache_dist.localcluster.hosts import Host, NoNamespaces, namespaces
from vlcache_dist.serve.auth import ENVIRONMENT, entry_of, new_key
from vlcache_dist.serve.readiness import failing, pools, require_room, wait_until_ready

MARK = "VLCACHE_LOCALCLUSTER"
GCS_PORT, DASHBOARD_PORT, METRICS_PORT = 6379, 8265, 8080
START_S, DEPLOY_S = 90.0, 180.0
QUICK_HEALTH_CHECKS = {  # a host that is gone is seen in seconds instead of a minute
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}
TINY = {
    "model": {"model": "tiny", "device": "cpu", "dtype": "float32"},
    "engine": {"store_bytes": 64 << 20, "kv_bytes": 64 << 20},
}


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running one. ``environment``: what processes on its hosts need to talk to Ray and to the endpoint."""

    hosts: list[Host]
    url: str
    api_key: str
    settings: Settings
    environment: dict[str, str]

    @property
    def head(self) -> Host:
        return self.hosts[0]

    def status(self) -> list[dict[str, Any]]:
        """What the workers say of themselves (``/status``). To be called inside one of the hosts."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        workers: list[dict[str, Any]] = (
            httpx.get(f"{self.url}/status", headers=headers).raise_for_status().json()["workers"]
        )
        return workers

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """A command on the first host, to its end."""
        with self.head.inside():
            return subprocess.run(command, env=self.environment, check=False, **options)


@contextlib.contextmanager
def running(
    config: Path, num_hosts: int, *, tiny: bool = False, isolate: bool = True, say: Callable[[str], None]
) -> Iterator[LocalCluster]:
    """A cluster of ``num_hosts`` with the application of a Serve config file, ready; afterwards, and after any error or
    signal, nothing of it is left. ``tiny``: the bundled model on CPUs instead of the model that the file names.
    Without ``isolate``, and where namespaces are not permitted, the hosts are raylets on this machine's loopback.
    Raises ConfigError, WorkerLost."""
    serve_config, settings = read(config, tiny=tiny)
    stack = contextlib.ExitStack()
    with terminate_as_interrupt():
        try:
            yield _started(stack, config.name, serve_config, settings, num_hosts, isolate, say)
        finally:
            with uninterrupted():
                say("stopping")
                stack.close()


def _started(
    stack: contextlib.ExitStack,
    name: str,
    serve_config: dict[str, Any],
    settings: Settings,
    num_hosts: int,
    isolate: bool,
    say: Callable[[str], None],
) -> LocalCluster:
    """``stack`` takes down what has been started, whenever it is closed."""
    mark = secrets.token_hex(3)
    hosts = _hosts(stack, num_hosts, mark, isolate, say)
    isolated = hosts[0].namespace is not None
    folder = Path(tempfile.mkdtemp(prefix=f"vlc-{mark}-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    stack.callback(end, lambda: marked(MARK, mark))
    api_key = new_key()
    token = secrets.token_hex(32)
    environment = {
        **os.environ,
        **QUICK_HEALTH_CHECKS,
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "2000",
        "RAY_worker_niceness": "0",
        "UCX_TLS": "tcp,self",
        ENVIRONMENT: entry_of(api_key),
    }
    _start_ray(hosts, placement(settings.serve, num_hosts), environment, folder, isolated=isolated, say=say)
    if not isolated:
        serve_config["proxy_location"] = "HeadOnly"  # all hosts share one address
    url = f"http://{hosts[0].address}:{serve_config['http_options']['port']}"
    own = {
        "RAY_ADDRESS": f"{hosts[0].address}:{GCS_PORT}",
        "VLCACHE_URL": url,
        "VLCACHE_API_KEY": api_key,
    }
    cluster = LocalCluster(hosts, url, api_key, settings, {**environment, **own})
    say(f"deploying {name}")
    with cluster.head.inside():
        _deploy(cluster, serve_config, token, say)
    return cluster


def read(config: Path, *, tiny: bool) -> tuple[dict[str, Any], Settings]:
    """A Serve config file and the settings in it. Raises ConfigError."""
    try:
        serve_config = yaml.safe_load(config.read_text())
        (application,) = serve_config["applications"]
        arguments = application["args"]
        port = serve_config["http_options"]["port"]
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror or error}") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{config} is no Serve config file with one application, args and a port: {error}") from error
    if not isinstance(port, int) or not 0 < port < 65536:
        raise ConfigError(f"{config}: http_options.port = {port!r} is no port")
    if tiny:
        arguments |= TINY
        arguments["serve"] = {**arguments.get("serve", {}), "gpus_per_worker": 0}
    settings = Settings.of(**arguments)
    if settings.serve.app_name != application["name"]:
        raise ConfigError(
            f"{config}: the application is called {application['name']!r}, but its serve.app_name is "
            f"{settings.serve.app_name!r}: make them one"
        )
    return serve_config, settings


def placement(settings: ServeSettings, num_hosts: int) -> list[dict[str, int]]:
    """The pool resources that each host offers: workers in turn, so that with enough hosts every worker has its own."""
    offers: list[dict[str, int]] = [{} for _ in range(num_hosts)]
    turn = 0
    for pool in pools(settings):
        for _ in range(pool.workers):
            offer = offers[turn % num_hosts]
            if pool.resource is not None:
                offer[pool.resource] = offer.get(pool.resource, 0) + 1
            turn += 1
    return offers


def _hosts(stack: contextlib.ExitStack, count: int, mark: str, isolate: bool, say: Callable[[str], None]) -> list[Host]:
    if not 2 <= count <= 4:
        raise ConfigError(f"{count} hosts: a local cluster has 2 to 4")
    if isolate:
        try:
            hosts = stack.enter_context(namespaces(count, mark))
        except NoNamespaces as error:
            say(f"network namespaces are not permitted here ({error}): using several raylets on this host")
        else:
            say(f"{count} hosts: {', '.join(f'{host.name} {host.address}' for host in hosts)}")
            return hosts
    return [Host(f"host-{i}", "127.0.0.1") for i in range(count)]


def _start_ray(
    hosts: Sequence[Host],
    offers: Sequence[Mapping[str, int]],
    environment: dict[str, str],
    folder: Path,
    *,
    isolated: bool,
    say: Callable[[str], None],
) -> None:
    say("starting Ray on every host")
    head, *others = list(zip(hosts, offers, strict=True))
    common = ["--num-cpus=4", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    common += [f"--metrics-export-port={METRICS_PORT}"] if isolated else ["--dashboard-agent-listen-port=0"]

    def start(host: Host, offer: Mapping[str, int], *more: str) -> None:
        temp = folder / (host.name if isolated else "host-0")
        command = [
            *(sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", *more, *common),
            *(f"--node-ip-address={host.address}", f"--resources={json.dumps(offer)}", f"--temp-dir={temp}"),
        ]
        with host.inside():
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=START_S, stdin=subprocess.DEVNULL
            )
        if done.returncode:
            raise WorkerLost(f"Ray does not start on {host.name}: {_last_line(done.stderr) or _last_line(done.stdout)}")

    try:
        dashboard = (f"--dashboard-host={hosts[0].address}", f"--dashboard-port={DASHBOARD_PORT}")
        start(*head, "--head", f"--port={GCS_PORT}", "--include-dashboard=true", *dashboard)
        with ThreadPoolExecutor(len(others)) as threads:
            list(threads.map(lambda each: start(*each, f"--address={hosts[0].address}:{GCS_PORT}"), others))
    except subprocess.TimeoutExpired as error:
        raise WorkerLost(f"Ray does not start within {START_S:.0f} s") from error


def _deploy(cluster: LocalCluster, serve_config: dict[str, Any], token: str, say: Callable[[str], None]) -> None:
    """What ``serve deploy`` and KubeRay do: PUT the config, then look until it runs."""
    own = cluster.settings.serve
    base = f"http://{cluster.head.address}:{DASHBOARD_PORT}"
    with httpx.Client(base_url=base, headers={"authorization": f"Bearer {token}"}, timeout=30.0) as dashboard:

        def nodes() -> list[dict[str, float]]:
            found = dashboard.get("/api/v0/nodes", params={"detail": "true"}).raise_for_status().json()
            return [n["resources_total"] for n in found["data"]["result"]["result"] if n["state"] == "ALIVE"]

        def failures() -> dict[str, str]:
            with contextlib.suppress(httpx.HTTPError):
                application = dashboard.get("/api/serve/applications/").json()["applications"].get(own.app_name, {})
                deployments = {
                    name: (about["status"], about["message"])
                    for name, about in application.get("deployments", {}).items()
                }
                status, message = application.get("status", ""), application.get("message", "")
                return failing(own.app_name, status, message, deployments)
            return {}

        require_room(own, nodes())
        reply = dashboard.put("/api/serve/applications/", json=serve_config)
        if reply.status_code != 200:
            raise ConfigError(f"Ray refuses the Serve config: HTTP {reply.status_code}: {_last_line(reply.text)}")
        wait_until_ready(
            cluster.url, own, DEPLOY_S, failures=failures, room=lambda: require_room(own, nodes()), say=say
        )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
