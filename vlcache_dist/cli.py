"""The command line: what ``vlcache-dist --help`` lists, read and handed to whoever does it."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from vlcache_dist.config import Settings
from vlcache_dist.errors import Unauthorized, VLCacheError
from vlcache_dist.loadtest.command import loadtest
from vlcache_dist.localcluster.command import localcluster
from vlcache_dist.serve.auth import ApiKeys
from vlcache_dist.serve.endpoint import base_of, check_endpoint
from vlcache_dist.serve.keys import api_key
from vlcache_dist.serve.readiness import start_with_token, use_token

app = typer.Typer(
    help="Qwen2.5-VL serving in which an image is paid for once.", no_args_is_help=True, add_completion=False
)

bench_app = typer.Typer(help="Benchmarks; JSON out.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.command()(loadtest)
app.command(context_settings={"allow_interspersed_args": False})(localcluster)
app.command("api-key")(api_key)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="'tiny' (bundled), a checkpoint folder, or a hub name")] = "tiny",
    host: Annotated[str, typer.Option(help="address that HTTP listens on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free port")] = 8000,
    encoders: Annotated[int, typer.Option(min=1, help="vision-encoder workers")] = 1,
    prefills: Annotated[int, typer.Option(min=1, help="prefill workers")] = 2,
    decodes: Annotated[int, typer.Option(min=0, help="decode workers; 0: prefill workers decode as well")] = 1,
    address: Annotated[str | None, typer.Option(help="join this Ray cluster instead of starting one")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="GPUs that Ray reserves for each worker, or each rank of it")
    ] = 0.0,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that share one language model, in prefill and decode workers")
    ] = 1,
    reuse: Annotated[str, typer.Option(help="default of requests: approx, exact or off")] = "approx",
    plan: Annotated[
        str, typer.Option(help="default recompute plan: guarded, none, uniform:5, pyramid:..., file:plan.json")
    ] = "guarded",
    donors: Annotated[
        str, typer.Option(help="whose image KV is shared: first (request), canonical or background")
    ] = "first",
    api_keys: Annotated[
        Path | None, typer.Option(help="file with what `vlcache-dist api-key` prints; without one: loopback only")
    ] = None,
    config: Annotated[str | None, typer.Option(help="JSON or YAML file with settings; options above win")] = None,
) -> None:
    """Start the whole system and serve until Ctrl-C."""
    console = Console(stderr=True)
    settings = _settings(
        config,
        model={"model": model, "device": device, "dtype": dtype},
        engine={"reuse": reuse, "plan": plan, "donors": donors, "tensor_parallel": tensor_parallel},
        serve={
            "host": host,
            "port": port,
            "encoders": encoders,
            "prefills": prefills,
            "decodes": decodes,
            "address": address,
            "gpus_per_worker": gpus_per_worker,
            **_keys(api_keys),
        },
    )
    with _told(console):
        check_endpoint(settings.serve)  # before seconds of imports
    if address is None:
        start_with_token()
    else:
        use_token()
    from vlcache_dist.serve.cluster import running

    with _told(console), running(settings, say=lambda text: console.print(text, style="dim")) as url:
        console.print(f"{settings.model.served_name or model} is served at {url}/v1 (Ctrl-C stops it)")
        signal.pause()


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of the output")] = False,
) -> None:
    """Start a cluster on this machine, ask it about pictures, show what was reused; exit 1 if an answer is wrong."""
    start_with_token()
    from vlcache_dist.demo.run import run, show
    from vlcache_dist.serve.cluster import running

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 170)
    settings = _settings(
        None,
        model={"model": "tiny", "device": "cpu", "dtype": "float32"},
        engine={"store_bytes": 64 << 20, "kv_bytes": 64 << 20},
        serve={"port": 0, "encoders": 1, "prefills": 2, "decodes": 1},
    )
    with _told(console), console.status("starting") as status:
        with running(settings, say=lambda text: status.update(text) or console.print(text, style="dim")) as url:  # type: ignore[func-returns-value]
            report = run(url, say=lambda text: status.update(text) or console.print(text, style="dim"))  # type: ignore[func-returns-value]
    show(report, console)
    if as_json:
        print(msgspec.json.encode(report).decode())
    raise typer.Exit(0 if report.ok else 1)


@bench_app.command("ttft")
def bench_ttft(
    json_file: Annotated[Path, typer.Option("--json", help="where the report goes")],
    shape: Annotated[str, typer.Option(help="tiny, 3b, 7b, 32b or 72b; weights are random")] = "7b",
    vision_tokens: Annotated[str, typer.Option(help="image sizes, comma-separated")] = "1024,4096,16384",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    plan: Annotated[str, typer.Option(help="recompute plan of warm requests")] = "uniform:2,min=16",
    runs: Annotated[int, typer.Option(min=1, help="timed runs after warm-up")] = 10,
    with_transformers: Annotated[bool, typer.Option(help="measure transformers in the same process")] = True,
    remote: Annotated[
        bool, typer.Option(help="warm with KV on another worker's GPU, beside warm with local KV")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="with --remote: what overlapped, as SVG")] = None,
) -> None:
    """Time to first token of one request, cold and warm, beside transformers."""
    from vlcache_dist.bench.ttft import run

    console = Console(stderr=True)
    if remote:
        _bench_ttft_remote(console, json_file, picture, shape, device, vision_tokens, plan, runs)
        return
    with _told(console):
        sizes = [int(size) for size in vision_tokens.split(",")]
        report = run(shape, device, sizes, plan, runs, with_transformers=with_transformers)
    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    table = Table(title=f"TTFT, {shape} shapes, ms")
    names = ("vision_tokens", "active_tokens", "cold_ms", "warm_ms", "warm_floor_ms", "transformers_ms")
    for name in names:
        table.add_column(name)
    for row in report["rows"]:
        table.add_row(*(f"{row[name]:.4g}" if row[name] is not None else "-" for name in names))
    console.print(table)


def _bench_ttft_remote(
    console: Console,
    json_file: Path,
    picture: Path | None,
    shape: str,
    device: str,
    vision_tokens: str,
    plan: str,
    runs: int,
) -> None:
    from vlcache_dist.bench.actor import ttft_remote
    from vlcache_dist.bench.remote import write_picture

    with _told(console):
        sizes = [int(size) for size in vision_tokens.split(",")]
        report = ttft_remote(shape, device, sizes, plan, runs)
    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    names = ("vision_tokens", "local_ms", "remote_ms", "ratio", "fetch_ms", "hidden")
    table = Table(title=f"warm TTFT, {shape} shapes: KV in the own store, and on another worker")
    for name in names:
        table.add_column(name)
    for row in report["rows"]:
        table.add_row(*(f"{row[name]:.4g}" if row.get(name) is not None else "-" for name in names))
    console.print(table)
    traced = [row for row in report["rows"] if row.get("trace", {}).get("computed_ms")]
    if picture is not None and traced:
        last = traced[-1]
        write_picture(last["trace"], picture, f"{last['vision_tokens']:,} vision tokens, {shape} shapes")
    if any("error" in row for row in report["rows"]):
        raise typer.Exit(1)


@bench_app.command("placement")
def bench_placement(
    json_file: Annotated[Path, typer.Option("--json", help="where the report goes")],
    engine: Annotated[Path, typer.Option(help="a report of `bench ttft`: how long encoding and prefill take")],
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="recorded trace, or a load test's result.json; repeatable [default: planned workloads]"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="play traces at so many requests per second")] = None,
    enlarge: Annotated[int, typer.Option(min=1, help="multiply the traces' vision tokens")] = 1,
    prefills: Annotated[int, typer.Option(min=1)] = 4,
    encoders: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """Placement policies over traces of requests, in simulation."""
    from vlcache_dist.bench import placement
    from vlcache_dist.loadtest.trace import read

    console = Console(stderr=True)
    with _told(console):
        traces = None
        if trace is not None:
            found = [each.enlarged(enlarge) for path in trace for each in read(path)]
            traces = [each if rate is None else each.scaled(rate) for each in found]
        pools = placement.Pools(prefills=prefills, encoders=encoders)
        report = placement.run(traces, pools, placement.read_engine(engine))
    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    table = Table(title=f"mean / p90 TTFT in ms, simulated: {prefills} prefill workers, {encoders} encoders")
    rows = {(row["trace"], row["policy"]): row for row in report["rows"]}
    policies = list(dict.fromkeys(policy for _, policy in rows))
    for name in ("trace", *policies):
        table.add_column(name)
    for name in report["traces"]:
        figures = (rows[name, policy] for policy in policies)
        table.add_row(name, *(f"{row['ttft_mean_ms']:.1f} / {row['ttft_p90_ms']:.1f}" for row in figures))
    console.print(table)


@bench_app.command("transfer")
def bench_transfer(
    json_file: Annotated[Path, typer.Option("--json", help="where the report goes")],
    device: Annotated[str, typer.Option(help="cpu, or cuda: one GPU reads the other's memory")] = "cpu",
    shape: Annotated[str, typer.Option(help="whose image of 1,600 tokens is read as well: tiny, 3b, 7b or 32b")] = "7b",
    seconds: Annotated[float, typer.Option(min=0.0, help="per size and kind of copy")] = 1.0,
    largest: Annotated[int, typer.Option(min=1 << 16, help="bytes of the largest READ")] = 1 << 30,
) -> None:
    """One Ray actor reads another's memory through NIXL, beside a plain copy in the same run."""
    from vlcache_dist.bench.actor import transfer
    from vlcache_dist.bench.transfer import SIZES, image_bytes

    console = Console(stderr=True)
    with _told(console):
        sizes = [size for size in SIZES if size <= largest]
        report = transfer(device, sizes, seconds, image_bytes(shape))
    json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    table = Table(title=f"READ through NIXL, {device}; plain copy {report['peer_copy_gbps']:.4g} GB/s")
    names = ("bytes", "descriptors", "gbps", "median_gbps", "median_us", "copy_median_gbps", "share")
    for name in names:
        table.add_column(name)
    for row in report["rows"]:
        table.add_row(*(f"{row[name]:.10g}" for name in names))
    console.print(table)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="'tiny' (bundled), a checkpoint folder, or a hub name")] = "tiny",
    suite: Annotated[str, typer.Option(help="tune, held-out, or a folder with JSON Lines and pictures")] = "held-out",
    policies: Annotated[
        str | None, typer.Option(help="separated by commas; see vlcache_dist.evaluate.policies and .names")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="plan file of `calibrate`: what the policy 'calibrated' is")] = None,
    cases: Annotated[int, typer.Option(min=1, help="cases per format, or lines per file")] = 32,
    seed: Annotated[int, typer.Option(help="of generated suites")] = 0,
    max_answer: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 12,
    donors: Annotated[str, typer.Option(help="recorded: in the suite's contexts; canonical: the picture alone")] = (
        "recorded"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="processes, each with a model of its own")] = 1,
    ttft: Annotated[
        int, typer.Option(min=0, help="also time the engine's first token: cases per format, policies that it serves")
    ] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="write all figures here; finished cases go beside it (.jsonl): run again to go on"),
    ] = None,
    from_json: Annotated[Path | None, typer.Option(help="measure nothing: show and draw what this file says")] = None,
    plots: Annotated[Path | None, typer.Option(help="write SVG plots to this folder")] = None,
) -> None:
    """Ask questions under other contexts' KV and show what every policy costs and gets wrong."""
    from vlcache_dist.evaluate import cli, figures, names
    from vlcache_dist.evaluate.journal import Journal
    from vlcache_dist.evaluate.workers import BenchSpec

    console = Console(stderr=True)
    with _told(console):
        if from_json is not None:
            found = figures.read_json(from_json)
        else:
            spec = BenchSpec(model, device, dtype, max_answer)
            asked = {"cases_per_format": cases, "seed": seed, "donors": donors, "dtype": dtype}
            chosen = cli.load_suite(suite, cases, seed, donors)
            checkpoint = cli.checkpoint(spec)
            asked |= {"model": checkpoint.fingerprint, "suite": suite}
            plans = names.spell_out(
                cli.split_policies(policies or cli.DEFAULT_POLICIES),
                model=checkpoint.fingerprint,
                num_layers=checkpoint.config.text.num_layers,
                plan=plan,
            )
            made_by = asked | {"max_answer": max_answer, "cases": cli.digest(chosen)}
            journal = Journal(json_file.with_suffix(".jsonl") if json_file is not None else None, made_by)
            with Progress(console=console) as bar:
                task = bar.add_task("batches", total=None)
                rows = cli.run_eval(
                    spec,
                    chosen,
                    plans,
                    journal,
                    workers,
                    lambda done, total: bar.update(task, completed=done, total=total),
                )
            found = {**asked, "plans": plans, "rows": rows}
            if ttft:
                found["ttft"] = cli.run_ttft(spec, chosen, ttft, plans)
            if json_file is not None:
                figures.write_json(json_file, found)
        if plots is not None:
            figures.write_plots(found, plots)
    rows = found["rows"]
    table = Table("format", "policy", "cases", "right", "in full", "KL", "% computed", "% escalated")
    for row in rows:
        shares = (f"{100 * row[name]:.1f}" for name in ("computed_share", "escalated_share"))
        right = (f"{row[name]:.3f}" for name in ("exact_match", "full_exact_match", "kl"))
        table.add_row(row["format"], row["policy"], str(row["cases"]), *right, *shares)
    out = Console(width=None if sys.stdout.isatty() else 150)
    out.print(table)
    if found.get("ttft"):
        times = Table("plan", "ms to first token", "of full")
        for row in found["ttft"]:
            times.add_row(row["plan"], f"{row['ttft_ms']:.1f}", f"{row['ratio_to_off']:.2f}")
        out.print(times)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="'tiny' (bundled), a checkpoint folder, or a hub name")] = "tiny",
    out: Annotated[Path, typer.Option(help="the plan file to write")] = Path("plan.json"),
    images: Annotated[Path | None, typer.Option(help="folder of pictures; without it the bundled suite 'tune'")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file, one question per line")] = None,
    budget: Annotated[float, typer.Option(min=0, max=100, help="percent of token-layers besides the probes")] = 2.0,
    kl_bound: Annotated[
        float | None, typer.Option(min=0, help="instead of a budget: the least one below this KL, nats")
    ] = None,
    leading: Annotated[int, typer.Option(min=0, help="probe tokens at the start of a picture")] = 0,
    strided: Annotated[int, typer.Option(min=0, help="probe tokens spread over it")] = 3,
    catch: Annotated[float, typer.Option(min=0.5, max=1, help="share of harmful cases that must alarm")] = 0.99,
    false_alarms: Annotated[
        float | None, typer.Option(min=0, max=1, help="instead of --catch: share of harmless cases that may alarm")
    ] = None,
    release: Annotated[
        float, typer.Option(min=0, max=1, help="share of harmful cases that a second pass behind an alarm may release")
    ] = 0.01,
    second_pass: Annotated[bool, typer.Option(help="look for a second pass behind an alarm")] = True,
    repair: Annotated[
        float,
        typer.Option(min=0, max=100, help="percent that a plan which always makes two passes may compute; 0: none"),
    ] = 5.0,
    cases: Annotated[int, typer.Option(min=1, help="cases per format of the bundled suite")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="processes, each with a model of its own")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Measure what a model's layers tell about harmful contexts and write a plan file with a canary. What is done is
    kept beside the plan (.jsonl); the same command goes on where a stopped one left off."""
    from vlcache_dist.evaluate import calibration, cli
    from vlcache_dist.evaluate.generated import generate
    from vlcache_dist.evaluate.journal import Journal
    from vlcache_dist.evaluate.workers import BenchSpec

    console = Console(stderr=True)
    with _told(console), Progress(console=console) as bar:
        if images is None:
            chosen, data = generate("tune", cases), f"suite tune, {cases} cases per format"
        else:
            lines = prompts.read_text().splitlines() if prompts is not None else []
            asked = {"prompts": tuple(line for line in lines if line.strip())} if prompts is not None else {}
            chosen, data = calibration.contexts(images, **asked), f"pictures in {images.name}"
        spec = BenchSpec(model, device, dtype)
        found = cli.checkpoint(spec)
        journal = Journal(
            out.with_suffix(".jsonl"),
            {"model": found.fingerprint, "dtype": dtype, "data": data, "prompts": cli.digest(chosen)},
        )
        stages: dict[str, TaskID] = {}

        def say(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage)
            bar.update(stages[stage], completed=done, total=total)

        contents = calibration.calibrate(
            calibration.Calibration(spec, journal, workers, say),
            chosen,
            calibration.Goal(
                budget, kl_bound, (leading, strided), catch, false_alarms, release if second_pass else None, repair
            ),
            model=found.fingerprint,
            num_layers=found.config.text.num_layers,
            data=data,
        )
        calibration.write_plan(out, contents)
    for line in calibration.summary(contents):
        console.print(line)
    console.print(f"{out}: serve it with --plan file:{out}")


@app.command()
def status(
    url: Annotated[str, typer.Option(help="base URL of a running server")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="VLCACHE_API_KEY", help="where the server asks for one")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="everything the workers say")] = False,
) -> None:
    """What a running server's workers are doing."""
    url = base_of(url)
    try:
        reply = httpx.get(f"{url}/status", headers={"authorization": f"Bearer {api_key}"}, timeout=10.0)
        if reply.status_code == 401:
            raise Unauthorized(f"{reply.json()['error']['message']} (--api-key, or VLCACHE_API_KEY)")
        reply.raise_for_status()
        report = reply.json()
    except (httpx.HTTPError, ValueError, VLCacheError) as error:
        Console(stderr=True).print(f"no answer from {url}: {error}", style="red")
        raise typer.Exit(1) from None
    if as_json:
        print(msgspec.json.encode(report).decode())
        return
    table = Table(title=report["model"])
    for title in ("worker", "device", "running", "waiting", "KV blocks free", "store used", "objects", "reads", "read"):
        table.add_column(title)
    for worker in report["workers"]:
        table.add_row(*_status_row(worker))
    Console().print(table)
    if drift := _drift_rows(report["workers"]):
        table = Table("prompts, all workers", "reuse is", "compared", "first token agrees", "KL", "missed alarms")
        for row in drift:
            table.add_row(*row)
        Console().print(table)


def _status_row(worker: dict[str, Any]) -> list[str]:
    load = worker["load"]
    if "error" in worker:
        return [worker["name"], worker["error"], *[""] * 7]
    return [
        worker["name"],
        worker["device"],
        str(load["running"]),
        str(load["waiting"]),
        f"{load['kv_blocks_free']}/{load['kv_blocks_total']}",
        f"{load['store_bytes_used'] / 2**20:.1f}/{load['store_bytes_total'] / 2**20:.0f} MiB",
        str(worker["store"]["num_objects"]),
        str(worker["transfers"]["reads"]),
        f"{worker['transfers']['bytes_read'] / 2**20:.1f} MiB",
    ]


def _drift_rows(workers: list[dict[str, Any]]) -> list[list[str]]:
    """What the guard knows per format of prompts: the common books, as the worker has them that has heard most; and how
    many workers act on that level."""
    books: dict[str, list[dict[str, Any]]] = {}
    for worker in workers:
        for name, about in worker.get("guard", {}).get("formats", {}).items():
            books.setdefault(name, []).append(about)
    rows = []
    for name, copies in sorted(books.items()):
        about = max(copies, key=lambda copy: copy["shadows"])
        agrees, kl = (f"{about['agreement']:.1%}", f"{about['kl']:.4f}") if about["shadows"] else ("-", "-")
        at_level = sum(copy["level"] == about["level"] for copy in copies)
        level = about["level"] if at_level == len(copies) else f"{about['level']} ({at_level} of {len(copies)})"
        compared = f"{about['shadows']} of {about['requests']}"
        rows.append([name, level, compared, agrees, kl, str(about["missed_alarms"])])
    return rows


def _keys(path: Path | None) -> dict[str, Any]:
    """Digests travel with the settings, so that ingresses on other machines need not have the file."""
    if path is None:
        return {}
    try:
        return {"api_keys": ApiKeys.read(path).entries()}
    except VLCacheError as error:
        Console(stderr=True).print(f"{error.code}: {error}", style="red")
        raise typer.Exit(2) from None


def _settings(path: str | None, **sections: dict[str, Any]) -> Settings:
    try:
        return Settings.read(path, **sections)
    except VLCacheError as error:
        Console(stderr=True).print(f"{error.code}: {error}", style="red")
        raise typer.Exit(2) from None


class _told:
    """Errors in one sentence instead of a traceback; Ctrl-C is not an error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> None:
        warnings.filterwarnings("ignore", module="ray")
        logging.getLogger("ray").setLevel(logging.WARNING)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._console.print("stopped", style="dim")
            sys.exit(130)
        if isinstance(error, VLCacheError | RuntimeError | httpx.HTTPError):
            self._console.print(f"{type(error).__name__}: {error}", style="red")
            sys.exit(1)


if __name__ == "__main__":
    app()
