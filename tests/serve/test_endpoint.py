"""The address that HTTP listens on: refused at once, in one sentence, where it cannot be had."""

from __future__ import annotations

import socket

import pytest

from vlcache_dist.config import ServeSettings
from vlcache_dist.errors import ConfigError
from vlcache_dist.serve.endpoint import base_of, check_endpoint, choose_port, url_of

ENTRY = f"sha256:{'0' * 64}"


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port {port} of 127\.0\.0\.1 is taken.*--port"):
            check_endpoint(ServeSettings(port=port))
        check_endpoint(ServeSettings(port=port, address="10.0.0.1:6379"))  # another machine may listen
    check_endpoint(ServeSettings(port=port))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_machine_is_not_called_a_taken_port(host: str) -> None:
    with pytest.raises(ConfigError, match=f"^{host} is no address of this machine"):
        check_endpoint(ServeSettings(host=host, api_keys=(ENTRY,)))


def test_an_open_endpoint_needs_keys() -> None:
    with pytest.raises(ConfigError, match="no API keys"):
        check_endpoint(ServeSettings(host="0.0.0.0", port=0))
    check_endpoint(ServeSettings(host="0.0.0.0", port=0, api_keys=(ENTRY,)))


def test_a_port_that_may_not_be_used_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ConfigError, match="may not be used by this user: choose one from 1024 on"):
        check_endpoint(ServeSettings(port=80))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_free_port_is_found(host: str) -> None:
    try:
        port = choose_port(ServeSettings(host=host, port=0))
    except ConfigError:
        pytest.skip(f"this machine has no {host}")
    assert port > 1023 and choose_port(ServeSettings(host=host, port=port)) == port


def test_urls() -> None:
    assert url_of("127.0.0.1", 1) == url_of("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert url_of("::1", 1) == url_of("::", 1) == "http://[::1]:1"
    assert {base_of(u) for u in ("localhost:1", "http://localhost:1/", "http://localhost:1/v1")} == {
        "http://localhost:1"
    }
    assert base_of("https://x/v1/") == "https://x"
