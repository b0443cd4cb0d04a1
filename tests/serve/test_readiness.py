"""Whether the pools can be placed, and what a start that does not succeed says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vlcache_dist.config import ServeSettings
from vlcache_dist.errors import ConfigError, WorkerLost
from vlcache_dist.serve.readiness import failing, last_error, pools, require_room, wait_until_ready


def settings(**values: object) -> ServeSettings:
    return ServeSettings(**values)


def test_pools_and_their_roles() -> None:
    split = pools(settings(encoders=2, prefills=3, decodes=1, gpus_per_worker=0.5, pool_resources=True))
    assert [(p.role, p.workers, p.gpus, p.resource) for p in split] == [
        ("encoder", 2, 0.5, "encoder_pool"),
        ("prefill", 3, 0.5, "prefill_pool"),
        ("decode", 1, 0.5, "decode_pool"),
    ]
    assert [p.role for p in pools(settings(decodes=0))] == ["encoder", "colocated"]


def test_too_few_gpus_are_named() -> None:
    wanted = settings(encoders=1, prefills=2, decodes=1, gpus_per_worker=1)
    require_room(wanted, [{"GPU": 4.0}])
    require_room(wanted, [{"GPU": 1.0}] * 4)
    with pytest.raises(ConfigError, match=r"1 encoder, 2 prefill, 1 decode workers with 1 GPU each need 4 GPUs.*has 3"):
        require_room(wanted, [{"GPU": 2.0}, {"GPU": 1.0}, {"CPU": 8.0}])


@pytest.mark.parametrize(
    ("each", "nodes", "fits"), [(0.5, [1.0, 1.0], True), (0.6, [2.0], False), (2, [3.0, 3.0], False)]
)
def test_a_workers_gpus_lie_on_one_node(each: float, nodes: list[float], fits: bool) -> None:
    wanted = settings(encoders=1, prefills=1, decodes=2 if each < 1 else 1, gpus_per_worker=each)
    if fits:
        require_room(wanted, [{"GPU": n} for n in nodes])
    else:
        with pytest.raises(ConfigError, match="hold"):
            require_room(wanted, [{"GPU": n} for n in nodes])


def test_all_ranks_of_a_worker_lie_on_one_node() -> None:
    wanted = settings(encoders=1, prefills=2, decodes=1, gpus_per_worker=1)
    assert [pool.ranks for pool in pools(wanted, 2)] == [1, 2, 2]
    require_room(wanted, [{"GPU": 4.0}, {"GPU": 3.0}], 2)
    with pytest.raises(ConfigError, match=r"2 prefill of 2 ranks, 1 decode of 2 ranks.*need 7 GPUs.*hold 3 of 4"):
        require_room(wanted, [{"GPU": 3.0}, {"GPU": 3.0}, {"GPU": 1.0}], 2)


def test_missing_pool_nodes_are_named() -> None:
    wanted = settings(encoders=1, prefills=2, decodes=1, pool_resources=True)
    nodes = [{"encoder_pool": 1.0}, {"prefill_pool": 1.0}, {"decode_pool": 1.0}]
    with pytest.raises(ConfigError, match=r"prefill pool wants 2 workers.*offer 1 of the resource prefill_pool"):
        require_room(wanted, nodes)
    require_room(wanted, [*nodes, {"prefill_pool": 1.0}])


@pytest.fixture
def health() -> Iterator[tuple[str, dict[str, str]]]:
    """An endpoint whose ``/healthz`` says what the test puts into the body."""
    said = {"body": '{"workers": {}}'}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said["body"].encode())

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", said
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_waits_for_every_worker(health: tuple[str, dict[str, str]]) -> None:
    url, said = health
    told: list[str] = []

    def then(text: str) -> None:
        told.append(text)
        said["body"] = '{"workers": {"encoder": 1, "prefill": 2, "decode": 1}}'

    said["body"] = '{"workers": {"encoder": 1, "prefill": 1, "decode": 1}}'
    wait_until_ready(url, settings(), 10.0, failures=dict, room=lambda: None, say=then)
    assert told[0] == "ready: 1 decode, 1 encoder, 1 prefill" and len(told) == 2


def test_a_worker_that_cannot_start_ends_the_wait_at_once(health: tuple[str, dict[str, str]]) -> None:
    url, _ = health
    message = (
        "Replica failed:\nTraceback (most recent call last):\n  x\nvlcache_dist.errors.ConfigError: it does not fit\n"
    )
    with pytest.raises(WorkerLost, match=r"^prefill cannot start: ConfigError: it does not fit$"):
        wait_until_ready(
            url, settings(), 30.0, failures=lambda: {"prefill": message}, room=lambda: None, say=lambda text: None
        )


def test_an_endpoint_that_never_answers_is_told_with_what_is_missing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        def room() -> None:
            raise ConfigError("too few GPUs")

        with pytest.raises(ConfigError, match="too few GPUs"):
            wait_until_ready(url, settings(), 0.3, failures=dict, room=room, say=lambda text: None)
        with pytest.raises(WorkerLost, match=r"after 0 s the pools have \{\}"):
            wait_until_ready(url, settings(), 0.3, failures=dict, room=lambda: None, say=lambda text: None)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "Traceback\nValueError: first\n\nray.exceptions.RayTaskError: x\nvlcache.errors.UnknownModel: no 'abc'",
            "UnknownModel: no 'abc'",
        ),
        ("KeyError", "KeyError"),
        ("it simply failed\nmore", "it simply failed"),
        ("  ", "no reason was given"),
    ],
)
def test_the_error_in_a_message(message: str, line: str) -> None:
    assert last_error(message) == line


def test_what_has_failed_is_told_apart_from_what_is_starting() -> None:
    starting = {"ingress": ("UPDATING", "waiting"), "prefill": ("HEALTHY", "")}
    assert failing("app", "DEPLOYING", "", starting) == {}
    assert failing("app", "DEPLOY_FAILED", "no such import", starting) == {"app": "no such import"}
    failed = {**starting, "encoder": ("UPDATING", "Traceback: x"), "decode": ("DEPLOY_FAILED", "y")}
    assert failing("app", "DEPLOY_FAILED", "z", failed) == {"encoder": "Traceback: x", "decode": "y"}
