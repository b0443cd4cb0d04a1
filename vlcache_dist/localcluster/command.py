"""``vlcache-dist localcluster``: options, what is said, the exit status."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console

from vlcache_dist.errors import VLCacheError
from vlcache_dist.localcluster.cluster import LocalCluster, running


def localcluster(
    command: Annotated[
        list[str] | None, typer.Argument(help="run this on the first host and stop; without it, serve until Ctrl-C")
    ] = None,
    config: Annotated[Path, typer.Option(help="Serve config file")] = Path("deploy/serve/cpu-1e-2p-1d.yaml"),
    hosts: Annotated[int, typer.Option(help="2 to 4")] = 4,
    tiny: Annotated[bool, typer.Option(help="the bundled model on CPUs instead of the file's model")] = False,
    isolate: Annotated[
        bool, typer.Option(help="hosts are network namespaces; otherwise raylets on this machine's loopback")
    ] = True,
    demo: Annotated[bool, typer.Option("--demo", help="ask the demo's questions and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the demo's report as the last line of the output")] = False,
) -> None:
    """Several hosts on this machine, Ray on each, the application across them; all of it is gone afterwards.

    A command finds VLCACHE_URL, VLCACHE_API_KEY, RAY_ADDRESS and RAY_AUTH_TOKEN in its environment.
    """
    console = Console(stderr=True, soft_wrap=True)
    try:
        with running(
            config, hosts, tiny=tiny, isolate=isolate, say=lambda text: console.print(text, style="dim")
        ) as cluster:
            status = _use(cluster, command or [], demo, as_json, console)
    except KeyboardInterrupt:
        console.print("stopped", style="dim")
        sys.exit(130)
    except (VLCacheError, RuntimeError, OSError, httpx.HTTPError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red")
        sys.exit(1)
    raise typer.Exit(status)


def _use(cluster: LocalCluster, command: list[str], demo: bool, as_json: bool, console: Console) -> int:
    if demo:
        from vlcache_dist.demo.run import run, show

        with cluster.head.inside():
            report = run(cluster.url, lambda text: console.print(text, style="dim"), api_key=cluster.api_key)
        show(report, console)
        if as_json:
            print(msgspec.json.encode(report).decode())
        return 0 if report.ok else 1
    if command:
        return cluster.run(command).returncode
    console.print(f"served at {cluster.url}/v1, API key {cluster.api_key} (Ctrl-C stops it)")
    if cluster.head.namespace is not None:
        console.print(f"reach it with: ip netns exec {cluster.head.namespace} curl {cluster.url}/healthz")
    signal.pause()
    return 0
