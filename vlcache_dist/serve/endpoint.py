"""The address that HTTP listens on: whether it can be had, and what it is called. Without Ray, so that a start that
cannot succeed says so at once."""

from __future__ import annotations

import errno
import socket

from vlcache_dist.config import ServeSettings
from vlcache_dist.errors import ConfigError
from vlcache_dist.serve.auth import require_keys


def check_endpoint(settings: ServeSettings) -> None:
    """Raises ConfigError if the endpoint would be open to others without API keys, or if its address is taken or not
    this machine's. Of a cluster that is joined, the machine that listens may be another."""
    require_keys(settings)
    if settings.address is None:
        _bound(settings.host, settings.port).close()


def choose_port(settings: ServeSettings) -> int:
    """The port that is asked for, or a free one for 0. Raises ConfigError."""
    if settings.port:
        return settings.port
    with _bound(settings.host, 0) as probe:
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """How this machine reaches a server that listens at ``host:port``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def base_of(url: str) -> str:
    """A server's base URL as people give it: ``localhost:8000``, ``http://localhost:8000/``, ``.../v1``."""
    return (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has had the address. Raises ConfigError."""
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError as error:
        probe.close()
        raise ConfigError(_reason(host, port, error)) from error
    return probe


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken: choose another with --port (0: a free one)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} of {host} may not be used by this user: choose one from 1024 on with --port"
    return f"{host} is no address of this machine to listen on: {error.strerror or error}"
