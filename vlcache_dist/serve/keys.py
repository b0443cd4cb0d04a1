"""``vlcache-dist api-key``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlcache_dist.errors import ConfigError
from vlcache_dist.serve.auth import DEFAULT_TENANT, entry_of, new_key


def api_key(
    tenant: Annotated[str, typer.Option(help="whose requests share a cache")] = DEFAULT_TENANT,
) -> None:
    """Make an API key: the key (for the client) goes to standard error, the line to keep (for the server) to standard
    output: ``vlcache-dist api-key >> keys``."""
    key = new_key()
    try:
        entry = entry_of(key, tenant)
    except ConfigError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"API key of {tenant}, shown only now: {key}", file=sys.stderr)
    print(entry)
