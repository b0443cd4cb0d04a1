"""API keys: who may ask, and as which tenant.

Only digests of keys are kept, in files, in settings and in memory: an entry is ``[TENANT] sha256:HEX``, one per line
of a file, separated by commas in the environment. Keys are random and long (``new_key``), so one SHA-256 is enough. A
key without a tenant belongs to ``default``; several keys may name one tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from vlcache_dist.config import ServeSettings
from vlcache_dist.errors import ConfigError, Unauthorized

ENVIRONMENT = "VLCACHE_API_KEYS"
DEFAULT_TENANT = "default"
_ENTRY = re.compile(r"(?:(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+)?sha256:(?P<digest>[0-9a-f]{64})")


class ApiKeys:
    """Digests of the keys that are let in."""

    def __init__(self, entries: Iterable[str], where: str = "serve.api_keys") -> None:
        """``entries`` as above; empty ones and comments (``#``) are skipped. Raises ConfigError, which never repeats
        what might be a key."""
        self._tenants: dict[bytes, str] = {}
        for number, entry in enumerate(entries, start=1):
            entry = entry.strip()
            if not entry or entry.startswith("#"):
                continue
            found = _ENTRY.fullmatch(entry)
            if found is None:
                raise ConfigError(
                    f"{where}, entry {number}: '[TENANT] sha256:' and 64 hexadecimal digits are wanted, as "
                    "`vlcache-dist api-key` prints them; keys themselves are not kept"
                )
            self._tenants[bytes.fromhex(found["digest"])] = found["tenant"] or DEFAULT_TENANT

    @classmethod
    def of(cls, settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> ApiKeys:
        """Keys from the settings, the file that they name, and the environment. Raises ConfigError: a file that is
        named but not there, or holds no key, would leave the endpoint open or dead without a word."""
        keys = cls(settings.api_keys)
        if settings.api_keys_file is not None:
            keys._tenants |= cls.read(Path(settings.api_keys_file))._tenants
        if ENVIRONMENT in environment:
            keys._tenants |= cls(environment[ENVIRONMENT].split(","), ENVIRONMENT)._tenants
        return keys

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Raises ConfigError."""
        try:
            keys = cls(path.read_text().splitlines(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"API keys cannot be read from {path}: {reason}") from error
        if not keys:
            raise ConfigError(f"{path} has no API key: add a line that `vlcache-dist api-key` prints")
        return keys

    def __len__(self) -> int:
        return len(self._tenants)

    def entries(self) -> tuple[str, ...]:
        """As they are written into settings."""
        return tuple(f"{tenant} sha256:{digest.hex()}" for digest, tenant in self._tenants.items())

    def tenant(self, key: str) -> str:
        """Whose key it is. Takes as long whichever key matches, or none. Raises Unauthorized."""
        presented = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        tenant = None
        for digest, name in self._tenants.items():
            if hmac.compare_digest(digest, presented):
                tenant = name
        if tenant is None:
            raise Unauthorized("the API key is not valid here")
        return tenant


class Guard:
    """Lets requests in: with a key, or, while there are no keys, from this machine alone, and then only if they come
    from their clients' ``addresses`` and not from a load balancer's."""

    def __init__(self, keys: ApiKeys, *, addresses: bool = True) -> None:
        self._keys = keys
        self._addresses = addresses

    def tenant(self, authorization: str | None, client: str | None) -> str:
        """The tenant that a request belongs to, from its ``Authorization`` header and the address that it came from.
        Raises Unauthorized."""
        if not self._keys:
            if client is not None and is_loopback(client) and self._addresses:
                return DEFAULT_TENANT
            raise Unauthorized("this server has no API keys, so it answers its own machine alone")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is wanted: send the header 'Authorization: Bearer KEY'")
        return self._keys.tenant(key.strip())


def new_key() -> str:
    """A key to give to a client: 256 random bits."""
    return f"vlc-{secrets.token_urlsafe(32)}"


def entry_of(key: str, tenant: str = DEFAULT_TENANT) -> str:
    """What is kept of a key. Raises ConfigError if the tenant's name will not do."""
    entry = f"{tenant} sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    if _ENTRY.fullmatch(entry) is None:
        raise ConfigError(
            f"tenant {tenant!r}: 1 to 64 letters, digits, '.', '_' and '-' are wanted, a letter or digit first"
        )
    return entry


def require_keys(settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError if others could reach an endpoint that asks nobody for a key."""
    if not is_loopback(settings.host) and not ApiKeys.of(settings, environment):
        raise ConfigError(
            f"serve.host = {settings.host!r} can be reached from other machines, but there are no API keys: name a "
            f"file with --api-keys or serve.api_keys_file, set {ENVIRONMENT}, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can be behind an address or name."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").split("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
