"""Where bytes may come from, and what happens when they do not come."""

from __future__ import annotations

import asyncio
import base64
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlcache_dist.config import MediaSettings
from vlcache_dist.errors import InvalidMedia, PayloadTooLarge
from vlcache_dist.media import MediaItem, MediaRef
from vlcache_dist.media_fetch import MediaFetcher, load_blocking, read_data_url

BODY = b"\x89PNG pretended"
LOOPBACK = MediaSettings(allow_networks=("127.0.0.0/8",), timeout_s=1.0, max_bytes=10_000, max_redirects=2)


class Handler(http.server.BaseHTTPRequestHandler):
    hosts: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.hosts.append(self.headers["host"])
        name = self.path.strip("/")
        if name.startswith("hop"):
            left = int(name[3:])
            self._answer(302, {"location": f"/hop{left - 1}" if left else "/ok"})
        elif name == "inside":
            self._answer(302, {"location": "http://10.0.0.1/secret.png"})
        elif name == "scheme":
            self._answer(302, {"location": "file:///etc/passwd"})
        elif name == "html":
            self._answer(200, {"content-type": "text/html"}, b"<html>")
        elif name == "gzip":
            self._answer(200, {"content-type": "image/png", "content-encoding": "gzip"}, BODY)
        elif name == "declared":
            self._answer(200, {"content-type": "image/png", "content-length": "20000"}, b"x" * 20_000)
        elif name == "endless":
            self._answer(200, {"content-type": "image/png"}, b"x" * 20_000)
        elif name == "slow":
            time.sleep(1.5)
            self._answer(200, {}, BODY)
        elif name == "ok":
            self._answer(200, {"content-type": "image/png; x=y"}, BODY)
        else:
            self._answer(404, {})

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            return  # the client had enough

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(url: str | tuple[str, ...], settings: MediaSettings = LOOPBACK, **options: Any) -> MediaItem:
    async def go() -> MediaItem:
        fetcher = MediaFetcher(settings, **options)
        try:
            urls = (url,) if isinstance(url, str) else url
            return await fetcher.load(MediaRef("image" if len(urls) == 1 else "video", urls, "messages[0].content[0]"))
        finally:
            await fetcher.close()

    return asyncio.run(go())


def test_fetched_under_its_own_host_name(site: str) -> None:
    named = site.replace("127.0.0.1", "localhost")
    assert fetch(f"{named}/ok", MediaSettings(allow_networks=("127.0.0.0/8", "::1/128"))).frames == (BODY,)
    assert Handler.hosts[-1] == named.removeprefix("http://")


def test_redirects_up_to_the_limit(site: str) -> None:
    assert fetch(f"{site}/hop1").frames == (BODY,)
    with pytest.raises(InvalidMedia, match="more than 2 redirects"):
        fetch(f"{site}/hop2")


@pytest.mark.parametrize(
    ("path", "error", "reason"),
    [
        ("inside", InvalidMedia, "not on the public network"),
        ("scheme", InvalidMedia, "not http or https"),
        ("html", InvalidMedia, "text/html"),
        ("gzip", InvalidMedia, "compressed"),
        ("missing", InvalidMedia, "answered 404"),
        ("declared", PayloadTooLarge, "more than 10000 bytes"),
        ("endless", PayloadTooLarge, "more than 10000 bytes"),
        ("slow", InvalidMedia, "not there after 1 s"),
    ],
)
def test_what_a_server_can_do_wrong(site: str, path: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason) as caught:
        fetch(f"{site}/{path}")
    assert str(caught.value).startswith("messages[0].content[0]: ")


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "10.0.0.8", "172.16.3.4", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "0.0.0.0", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]", "[2002:7f00:1::]", "[64:ff9b::a00:1]", "224.0.0.1", "255.255.255.255", "192.0.2.1",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_addresses_that_are_not_public_are_never_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr("anyio.connect_tcp", connect)
    with pytest.raises(InvalidMedia, match=r"not on the public network|cannot be resolved"):
        fetch(f"http://{host}:80/x.png", MediaSettings(timeout_s=2.0))


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    async def both(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", (a, port)) for a in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", both)
    with pytest.raises(InvalidMedia, match="not on the public network"):
        fetch("http://rebind.example/x.png")


def test_the_connection_goes_to_the_address_that_was_checked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to something else the second time (DNS rebinding) gains nothing."""
    port = int(site.rsplit(":", 1)[1])
    answers = iter(["127.0.0.1", "10.0.0.1"])
    original = asyncio.BaseEventLoop.getaddrinfo

    async def changing(self: Any, host: str, port: int, **options: Any) -> Any:
        if host == "rebind.example":
            return [(socket.AF_INET, 1, 6, "", (next(answers), port))]
        return await original(self, host, port, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", changing)
    assert fetch(f"http://rebind.example:{port}/ok").frames == (BODY,)
    assert next(answers) == "10.0.0.1"
    assert Handler.hosts[-1] == f"rebind.example:{port}"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x",
        "file:///etc/passwd",
        "x.png",
        "http:///x.png",
        "http://u:p@example.com/x",
        "http://[bad/x",
    ],
)
def test_urls_that_are_not_taken(url: str) -> None:
    with pytest.raises(InvalidMedia, match=r"^messages\[0\]\.content\[0\]: "):
        fetch(url)


def test_unreachable_and_switched_off(site: str) -> None:
    with pytest.raises(InvalidMedia, match="cannot be fetched"):
        fetch("http://127.0.0.1:9/x.png")
    with pytest.raises(InvalidMedia, match="not fetched here"):
        fetch(f"{site}/ok", MediaSettings(fetch_urls=False))


def test_data_urls() -> None:
    encoded = base64.b64encode(BODY).decode()
    for head in ("data:image/png;base64", "data:;base64", "data:image/png;charset=x;base64", "DATA:image/PNG;BASE64"):
        assert fetch(f"{head},{encoded}").frames == (BODY,)
    assert read_data_url("data:image/png,%89PNG", 100, "x") == b"\x89PNG"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("data:image/png;base64", InvalidMedia),
        ("data:image/png;base64,@@@@", InvalidMedia),
        ("data:image/png;base64,AAA", InvalidMedia),
        ("data:text/plain;base64,AAAA", InvalidMedia),
        ("data:image/png;base64," + "A" * 20_000, PayloadTooLarge),
        ("data:image/png," + "A" * 20_000, PayloadTooLarge),
        ("data:image/png," + "A" * 40_000, PayloadTooLarge),
    ],
)
def test_bad_data_urls(url: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        fetch(url)


def test_a_video_s_frames_share_one_limit() -> None:
    frame = "data:image/png;base64," + base64.b64encode(b"x" * 6_000).decode()
    assert len(fetch((frame,)).frames) == 1
    with pytest.raises(PayloadTooLarge):
        fetch((frame, frame))


def test_files_only_in_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(BODY)
    assert fetch(path.as_uri(), allow_files=True).frames == (BODY,)
    (item,) = load_blocking(LOOPBACK, (MediaRef("image", (path.as_uri(),), "here"),))
    assert item.frames == (BODY,) and item.where == "here"
    with pytest.raises(InvalidMedia, match="No such file"):
        fetch((tmp_path / "none.png").as_uri(), allow_files=True)
    path.write_bytes(b"x" * 10_001)
    with pytest.raises(PayloadTooLarge):
        fetch(path.as_uri(), allow_files=True)


def test_the_library_works_inside_a_running_loop(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(BODY)

    async def notebook() -> list[MediaItem]:
        return load_blocking(LOOPBACK, (MediaRef("image", (path.as_uri(),), "here"),))

    assert asyncio.run(notebook())[0].frames == (BODY,)


def test_many_items_keep_their_order_and_one_failure_is_the_request_s(site: str) -> None:
    async def go(*urls: str) -> list[MediaItem]:
        fetcher = MediaFetcher(LOOPBACK)
        try:
            return await fetcher.load_all(tuple(MediaRef("image", (u,), f"item {i}") for i, u in enumerate(urls)))
        finally:
            await fetcher.close()

    found = asyncio.run(go(f"{site}/ok", "data:;base64,AAAA", f"{site}/hop0"))
    assert [item.where for item in found] == ["item 0", "item 1", "item 2"]
    with pytest.raises(InvalidMedia, match="item 1"):
        asyncio.run(go(f"{site}/ok", f"{site}/missing"))
    with pytest.raises(InvalidMedia, match="at most 64"):
        asyncio.run(go(*["data:;base64,AAAA"] * 65))
