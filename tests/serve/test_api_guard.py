"""Who is let in, with and without API keys."""

from __future__ import annotations

import pytest

from vlcache_dist.errors import Unauthorized
from vlcache_dist.serve.auth import DEFAULT_TENANT, ApiKeys, Guard, entry_of, new_key


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_without_keys_this_machine_alone(client: str) -> None:
    guard = Guard(ApiKeys(()))
    assert guard.tenant(None, client) == DEFAULT_TENANT
    for other in ("10.0.0.4", "::ffff:10.0.0.4", "localhost.example.org", None):
        with pytest.raises(Unauthorized, match="no API keys"):
            guard.tenant(None, other)


def test_without_keys_nobody_if_addresses_are_a_load_balancers() -> None:
    with pytest.raises(Unauthorized, match="no API keys"):
        Guard(ApiKeys(()), addresses=False).tenant(None, "127.0.0.1")


def test_with_keys_the_key_decides_wherever_it_comes_from() -> None:
    key = new_key()
    for guard in (Guard(ApiKeys((entry_of(key, "a"),))), Guard(ApiKeys((entry_of(key, "a"),)), addresses=False)):
        assert guard.tenant(f"Bearer {key}", "10.0.0.4") == "a"
        for header in (None, "", "Bearer ", f"Basic {key}", f"Bearer {key}x"):
            with pytest.raises(Unauthorized):
                guard.tenant(header, "127.0.0.1")
