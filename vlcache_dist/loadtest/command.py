"""``vlcache-dist loadtest``: options, progress, files."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlcache_dist.config import Settings
from vlcache_dist.errors import ConfigError, VLCacheError
from vlcache_dist.loadtest import dataset, report
from vlcache_dist.loadtest.records import Objective, Run
from vlcache_dist.loadtest.scenario import SCENARIOS, Scenario, plan, share_of
from vlcache_dist.serve.readiness import check_reachable, start_with_token, use_token

SHARES = (0.0, 25.0, 50.0, 75.0, 95.0)  #: percent

Tell = Callable[[str, int, int], None]


def loadtest(
    url: Annotated[
        str | None, typer.Option(envvar="VLCACHE_URL", help="a running deployment; without it one is started")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster for the clients, and for the deployment without --url"),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SCENARIOS)}, or a JSON file; repeatable [default: document-qa]"),
    ] = None,
    rate: Annotated[list[float] | None, typer.Option(help="requests per second; repeatable [default: 4]")] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="percent of image slots that are repeated; repeatable [default: 0 25 50 75 95]"),
    ] = None,
    duration: Annotated[float, typer.Option(min=0.1, help="seconds of arrivals in each arm of a point")] = 30.0,
    max_requests: Annotated[int, typer.Option(min=1, help="of one arm of a point")] = 1000,
    time_limit: Annotated[float, typer.Option(min=1, help="seconds after which no further point is begun")] = 3600.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds after which a request has failed")] = 60.0,
    clients: Annotated[int, typer.Option(min=0, help="client tasks; 0: one per Ray node, or this process")] = 0,
    reuse: Annotated[str, typer.Option(help="compared with off: approx or exact")] = "approx",
    ttft: Annotated[float, typer.Option(help="objective: first token within so many ms of its time")] = 500.0,
    itl: Annotated[float, typer.Option(help="objective: mean gap between tokens in ms")] = 100.0,
    seed: Annotated[
        int | None,
        typer.Option(help="of pictures and arrivals; a seed that a deployment has seen finds its caches full"),
    ] = None,
    metrics_url: Annotated[
        list[str] | None, typer.Option(help="Prometheus pages of all ingresses; repeatable [default: the deployment's]")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLCACHE_API_KEY", help="one key for all tenants")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="file with API keys, one per line; tenant n uses key n")] = None,
    prefills: Annotated[int, typer.Option(min=1, help="of a deployment that is started")] = 2,
    decodes: Annotated[int, typer.Option(min=0, help="of a deployment that is started")] = 1,
    config: Annotated[str | None, typer.Option(help="settings of a deployment that is started")] = None,
    export: Annotated[
        Path | None, typer.Option(help="write the data set here, for this and other load generators, and stop")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for report.html and result.json")] = Path("loadtest-report"),
) -> None:
    """Measure a deployment with and without reuse, at several rates and shares of repeated pictures; write a report."""
    console = Console(stderr=True)
    measured: list[Run] = []

    def keep(run: Run) -> None:
        _write(out, run)
        measured[:] = [run]

    try:
        scenarios = tuple(_scenario(name) for name in scenario or ("document-qa",))
        shares = tuple(value / 100 for value in share or SHARES)
        rates = tuple(rate or (4.0,))
        seed = int(time.time()) if seed is None else seed
        if export is not None:
            _export(export, scenarios, shares, max(1, min(round(rates[0] * duration), max_requests)), seed, console)
            return
        keys = _keys(api_keys) or ((api_key,) if api_key else ())
        if address is not None:
            check_reachable(address)
            use_token()
        elif url is None:
            start_with_token()
        from vlcache_dist.loadtest import actor
        from vlcache_dist.loadtest.run import Options, find, measure

        with _deployment(url, address, prefills, decodes, config, console) as base:
            options = Options(
                scenarios=scenarios,
                rates=rates,
                shares=shares,
                objective=Objective(ttft, itl),
                duration_s=duration,
                max_requests=max_requests,
                timeout_s=timeout,
                limit_s=time_limit,
                seed=seed,
                reuse=reuse,
                clients=clients or (len(actor.places(base)) if actor.is_joined() else 1),
                metrics_urls=tuple(metrics_url or ("/metrics",)),
            )
            console.print(
                f"about {options.expected_s():.0f} s of load by {options.clients} clients on {base}", style="dim"
            )
            with _progress(console) as tell:
                measure(find(base, keys), options, tell, keep)
        _show(out, measured[-1], console)
    except KeyboardInterrupt:
        _show_early(out, measured, console)
        console.print("stopped", style="dim")
        sys.exit(130)
    except (VLCacheError, RuntimeError, OSError, httpx.HTTPError, ValueError) as error:
        _show_early(out, measured, console)
        console.print(f"{type(error).__name__}: {error}", style="red", soft_wrap=True)
        sys.exit(1)


def _scenario(name: str) -> Scenario:
    if name in SCENARIOS:
        return SCENARIOS[name]
    path = Path(name)
    if path.suffix != ".json" or not path.exists():
        raise ConfigError(f"scenario {name!r} is unknown; known: {', '.join(SCENARIOS)}, or the path of a JSON file")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Scenario)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"API keys cannot be read from {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} has no API keys: one per line is wanted")
    return keys


@contextlib.contextmanager
def _deployment(
    url: str | None, address: str | None, prefills: int, decodes: int, config: str | None, console: Console
) -> Iterator[str]:
    """The base URL of what is measured; started here, and stopped again, unless ``url`` names it."""
    from vlcache_dist.loadtest import actor

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    warnings.filterwarnings("ignore", module="ray")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if url is not None:
        if address is not None:
            actor.join(address)
        try:
            yield url
        finally:
            if address is not None:
                actor.leave()
        return
    from vlcache_dist.serve.cluster import running

    serve = {"port": 0, "prefills": prefills, "decodes": decodes, "address": address}
    settings = Settings.read(config, serve=serve)
    with running(settings, say=lambda text: console.print(text, style="dim")) as base:
        yield base


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Tell]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, int] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)  # type: ignore[arg-type]

        yield tell


def _export(
    folder: Path, scenarios: tuple[Scenario, ...], shares: tuple[float, ...], count: int, seed: int, console: Console
) -> None:
    for each in scenarios:
        for share in shares:
            planned = plan(each, share, count, seed)
            where = folder / f"{each.name}-{share * 100:g}"
            written = dataset.write(where, each, planned, seed, dataset.FORMATS)
            names = ", ".join(path.name for path in written)
            console.print(f"{where}: {count} requests, {share_of(planned):.0%} of image slots repeated: {names}")


def _write(out: Path, run: Run) -> None:
    """Replaces what an earlier point has left."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_bytes(msgspec.json.encode(run))
    (out / "report.html").write_text(report.html(run))
    tables = [
        f"{name}, {rate:g} requests per second\n\n"
        + report.markdown([point for point in run.points if (point.scenario, point.rate) == (name, rate)])
        + "\n"
        for name, rate in dict.fromkeys((point.scenario, point.rate) for point in run.points)
    ]
    (out / "table.md").write_text("".join(tables) + (f"{said}\n" if (said := report.early(run)) else ""))


def _show(out: Path, run: Run, console: Console) -> None:
    print((out / "table.md").read_text(), end="")
    console.print(f"{out / 'report.html'}, {out / 'result.json'}, {out / 'table.md'}")


def _show_early(out: Path, measured: list[Run], console: Console) -> None:
    """What there is of a run that does not end as planned."""
    if measured and measured[-1].missing:
        _show(out, measured[-1], console)
