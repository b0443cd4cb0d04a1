"""Getting the bytes of a picture: data URLs, http(s) URLs, and, in the library only, ``file:`` URLs.

Fetching on a client's behalf must not open the operator's network to the client. So the host is resolved here, every
address it has must be public (or in ``allow_networks``), the connection goes to exactly the address that was checked
(no second resolution that could answer differently), and every redirect passes the same gate. Proxies from the
environment are not used, because a proxy would resolve again.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import socket
import urllib.parse
import urllib.request
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pybase64

from vlcache_dist.config import MediaSettings
from vlcache_dist.errors import InvalidMedia, PayloadTooLarge
from vlcache_dist.media import MediaItem, MediaRef

T = TypeVar("T")
_REDIRECTS = (301, 302, 303, 307, 308)
_OPAQUE_TYPES = ("application/octet-stream", "binary/octet-stream", "")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class MediaFetcher:
    """Loads media items. One per event loop; ``close`` it. ``allow_files``: take ``file:`` URLs (library only)."""

    def __init__(self, settings: MediaSettings, *, allow_files: bool = False) -> None:
        self._settings = settings
        self._allow_files = allow_files
        self._allowed = tuple(ipaddress.ip_network(network) for network in settings.allow_networks)
        self._client: httpx.AsyncClient | None = None

    async def load_all(self, refs: tuple[MediaRef, ...]) -> list[MediaItem]:
        """All media of a request, concurrently, in order. Raises InvalidMedia or PayloadTooLarge for the first that
        fails; the others are cancelled."""
        if len(refs) > self._settings.max_items:
            raise InvalidMedia(f"{len(refs)} images and videos, at most {self._settings.max_items} are taken")
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.load(ref)) for ref in refs]
        except* (InvalidMedia, PayloadTooLarge) as errors:
            raise _first(errors) from None
        return [task.result() for task in tasks]

    async def load(self, ref: MediaRef) -> MediaItem:
        """Raises InvalidMedia or PayloadTooLarge, naming ``ref.where``."""
        if len(ref.urls) > self._settings.max_frames:
            raise InvalidMedia(f"{ref.where}: {len(ref.urls)} frames, at most {self._settings.max_frames} are taken")
        left = self._settings.max_bytes
        frames = []
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                for url in ref.urls:
                    data = await self._read(url, left, ref.where)
                    left -= len(data)
                    frames.append(data)
        except TimeoutError:
            raise InvalidMedia(f"{ref.where}: not there after {self._settings.timeout_s:g} s") from None
        return MediaItem.of(ref.modality, tuple(frames), ref.where, ref.fps)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _read(self, url: str, limit: int, where: str) -> bytes:
        scheme = url.split(":", 1)[0].lower()
        if scheme == "data":
            return read_data_url(url, limit, where)
        if scheme in ("http", "https"):
            if not self._settings.fetch_urls:
                raise InvalidMedia(f"{where}: URLs are not fetched here; send the picture as a data URL")
            return await self._get(url, limit, where)
        if scheme == "file" and self._allow_files:
            return await asyncio.to_thread(_read_file, url, limit, where)
        raise InvalidMedia(f"{where}: {scheme[:20]!r} is not a URL scheme that is taken (data, http, https are)")

    async def _get(self, url: str, limit: int, where: str) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            try:
                redirect, data = await self._hop(url, limit, where)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                raise InvalidMedia(f"{where}: cannot be fetched: {reason}") from error
            if redirect is None:
                return data
            url = redirect
        raise InvalidMedia(f"{where}: more than {self._settings.max_redirects} redirects")

    async def _hop(self, url: str, limit: int, where: str) -> tuple[str | None, bytes]:
        """One request: (where it redirects to, nothing) or (None, the body)."""
        target = httpx.URL(url)
        if target.scheme not in ("http", "https") or not target.host:
            raise InvalidMedia(f"{where}: leads to a URL that is not http or https")
        if target.userinfo:
            raise InvalidMedia(f"{where}: URLs with credentials are not fetched")
        address = await self._resolve(target, where)
        request = self._http().build_request(
            "GET",
            target.copy_with(host=str(address), fragment=None),
            headers={"host": target.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"},
            extensions={"sni_hostname": target.raw_host.decode("ascii")},
        )
        response = await self._http().send(request, stream=True)
        try:
            if response.status_code in _REDIRECTS:
                location = response.headers.get("location")
                if not location:
                    raise InvalidMedia(f"{where}: redirect without a location")
                return str(target.join(location)), b""
            if response.status_code != 200:
                raise InvalidMedia(f"{where}: the server answered {response.status_code}")
            _check_type(response.headers.get("content-type", ""), where)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise InvalidMedia(f"{where}: the server sent a compressed body although none was asked for")
            return None, await _body(response, limit, where)
        finally:
            await response.aclose()

    async def _resolve(self, url: httpx.URL, where: str) -> Address:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise InvalidMedia(f"{where}: host {url.host[:253]!r} cannot be resolved") from error
        addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
        for address in addresses:
            if not self._may_connect(address):
                # Does not say which address: the client must not learn the internal network's names from us.
                raise InvalidMedia(f"{where}: host {url.host[:253]!r} is not on the public network")
        return addresses[0]

    def _may_connect(self, address: Address) -> bool:
        real = _embedded_ipv4(address) or address
        if any(network.version == real.version and real in network for network in self._allowed):
            return True
        return real.is_global and not (real.is_multicast or real.is_reserved or real.is_unspecified)

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                trust_env=False,
                follow_redirects=False,
                # Connections are not kept: they are pinned to an address under another host's name.
                limits=httpx.Limits(max_connections=64, max_keepalive_connections=0),
                timeout=httpx.Timeout(self._settings.timeout_s, connect=self._settings.connect_timeout_s),
            )
        return self._client


def load_blocking(settings: MediaSettings, refs: tuple[MediaRef, ...]) -> list[MediaItem]:
    """For the library: ``file:`` URLs are taken, and a notebook's running event loop is no obstacle."""

    async def load() -> list[MediaItem]:
        fetcher = MediaFetcher(settings, allow_files=True)
        try:
            return await fetcher.load_all(refs)
        finally:
            await fetcher.close()

    return _run_aside(load())


def read_data_url(url: str, limit: int, where: str) -> bytes:
    """``data:[image/...][;base64],...``. Raises InvalidMedia, or PayloadTooLarge above ``limit`` bytes."""
    head, comma, body = url.partition(",")
    if not comma:
        raise InvalidMedia(f"{where}: a data URL without a comma")
    media_type, *parameters = head[len("data:") :].split(";")
    _check_type(media_type, where)
    if not parameters or parameters[-1].strip().lower() != "base64":
        if len(body) > 3 * limit:
            raise PayloadTooLarge(f"{where}: more than {limit} bytes")
        data = urllib.parse.unquote_to_bytes(body)
    else:
        if len(body) > limit * 4 // 3 + 1024:
            raise PayloadTooLarge(f"{where}: more than {limit} bytes")
        try:
            data = pybase64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidMedia(f"{where}: not valid base64: {error}") from error
    if len(data) > limit:
        raise PayloadTooLarge(f"{where}: more than {limit} bytes")
    return data


def _check_type(content_type: str, where: str) -> None:
    media_type = content_type.split(";")[0].strip().lower()
    if not media_type.startswith("image/") and media_type not in _OPAQUE_TYPES:
        raise InvalidMedia(f"{where}: {media_type[:100]!r} is not a picture")


async def _body(response: httpx.Response, limit: int, where: str) -> bytes:
    declared = response.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise PayloadTooLarge(f"{where}: more than {limit} bytes")
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            raise PayloadTooLarge(f"{where}: more than {limit} bytes")
    return bytes(data)


def _read_file(url: str, limit: int, where: str) -> bytes:
    parsed = urllib.parse.urlsplit(url)
    if parsed.netloc not in ("", "localhost"):
        raise InvalidMedia(f"{where}: a file URL of another host")
    path = Path(urllib.request.url2pathname(parsed.path))
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InvalidMedia(f"{where}: {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise PayloadTooLarge(f"{where}: more than {limit} bytes")
    return data


def _embedded_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to (mapped, 6to4, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _run_aside(work: Coroutine[Any, Any, T]) -> T:
    with ThreadPoolExecutor(1, thread_name_prefix="media") as thread:
        return thread.submit(asyncio.run, work).result()
