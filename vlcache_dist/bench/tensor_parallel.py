"""What tensor parallelism costs and brings: the same engine on one rank and on several, sums over ranks, shard-to-shard
READs. Weights are random, and the same whatever the number of ranks; followers are processes of this machine.

Parts of the report, each of which may say ``error`` instead:

check        a few layers on one rank and on several: largest deviation of the recorded KV (rank 0's heads) over its
             largest magnitude, how many greedy tokens agree before the first that differs, and the largest deviation of
             their logprobs
all_reduce   the median time of a sum of ``rows`` hidden states over all ranks, in microseconds
engine_N     on N ranks: cold and warm TTFT and decode steps, as ``bench ttft`` measures them
transfer     between two workers of as many ranks on the same GPUs, the second's ranks on them in another order, so that
             every shard crosses between GPUs: one READ of ``bytes`` per shard, all shards together in 10^9 bytes/s

``python -m vlcache_dist.bench.tensor_parallel ROLE ...`` is one of its other processes.
"""

from __future__ import annotations

import base64
import gc
import logging
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from vlcache_dist.bench.shapes import model_config
from vlcache_dist.bench.ttft import WARM_UP, Bench, machine, median
from vlcache_dist.config import EngineSettings
from vlcache_dist.engine.api import Admitted, Compute, Failed, TokenEvent
from vlcache_dist.engine.engine import Engine
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.parallel import AllReduce, LanguageShard, Shard
from vlcache_dist.model.vision import VisionTower
from vlcache_dist.parallel import protocol
from vlcache_dist.parallel.build import assemble, open_arenas
from vlcache_dist.parallel.collective import Collective, host_store, join_store
from vlcache_dist.parallel.follower import follow, leave_soon
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.link import Invitation
from vlcache_dist.parallel.processes import Processes
from vlcache_dist.parallel.transport import ShardedTransport
from vlcache_dist.transfer.base import PeerInfo, Piece, Transport
from vlcache_dist.types import ObjectKind, SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
CHECK_LAYERS, CHECK_TOKENS, CHECK_ANSWER = 4, 256, 16
REDUCE_ROWS = (1, 16, 64, 256, 1024, 4096)
REDUCE_RUNS = 50
READ_BYTES = (1 << 20, 16 << 20, 64 << 20, 256 << 20)
READ_RUNS, READ_S = 20, 30.0


def command(role: str, *arguments: object) -> tuple[str, ...]:
    """How one of the other processes is started."""
    return (sys.executable, "-m", "vlcache_dist.bench.tensor_parallel", role, *map(str, arguments))


# -- engines ------------------------------------------------------------------------------------------------------


def random_shard(
    config: ModelConfig, shard: Shard, all_reduce: AllReduce, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageShard, VisionTower | None]:
    """A rank's part of what ``bench.shapes.random_models`` draws, number by number; the tower on rank 0 only."""
    generator = torch.Generator(device).manual_seed(0)
    model = LanguageShard(config.text, config.tie_word_embeddings, shard, all_reduce, device, dtype)
    whole = LanguageModel(config.text, config.tie_word_embeddings, "meta", dtype)
    with torch.inference_mode():
        for name, shape in whole.parameters().items():
            model.fill(name, _draw(name, torch.empty(shape.shape, device=device, dtype=dtype), generator))
        if shard.rank:
            return model, None
        tower = VisionTower(config.vision, device, dtype)
        for name, tensor in tower.parameters().items():
            _draw(name, tensor, generator)
    return model, tower


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name or "ln_q" in name:
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, 0.02, generator=generator)


class ShardedBench(Bench):
    """``Bench`` over several ranks, on the GPUs from ``device`` on. To be closed."""

    def __init__(
        self,
        ranks: int,
        shape: str,
        device: str,
        max_vision_tokens: int,
        plan: str,
        *,
        layers: int | None = None,
        graphs: bool = False,
    ) -> None:
        self.ranks = ranks
        self._graphed = graphs
        self._group = ShardGroup(Processes(command("follow", shape, layers or 0)), ranks)
        try:
            super().__init__(shape, device, max_vision_tokens, plan, layers=layers)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the other ranks."""
        self._group.close()

    def _build(self, settings: EngineSettings, limit: int) -> tuple[Engine, VisionTower]:
        open_arenas(self._group, self.arena.tensor, self.layout)
        towers: list[VisionTower] = []

        def load(collective: Collective) -> LanguageShard:
            shard = Shard(0, self.ranks)
            language, tower = random_shard(
                self.config, shard, collective.all_reduce, self.device, self.arena.tensor.dtype
            )
            towers.extend([tower] if tower is not None else [])
            return language

        engine = assemble(
            self._group,
            load,
            "",
            self.config,
            settings,
            self.arena,
            self.store,
            max_model_len=limit,
            graphs=self._graphed,
        )
        return engine, towers[0]


def make_bench(ranks: int, *about: Any, **options: Any) -> Bench:
    """A bench over so many ranks; ``about`` as for ``Bench``."""
    return Bench(*about, **options) if ranks == 1 else ShardedBench(ranks, *about, **options)


def close_bench(bench: Bench) -> None:
    if isinstance(bench, ShardedBench):
        bench.close()


def engine_figures(
    ranks: int,
    shape: str,
    device: str,
    vision_tokens: Sequence[int],
    plan: str,
    runs: int,
    batches: Sequence[int],
    **options: bool,
) -> dict[str, Any]:
    """Medians in milliseconds, as ``bench.ttft.run`` takes them."""
    bench = make_bench(ranks, shape, device, max(vision_tokens), plan, **options)
    try:
        rows = []
        for tokens in vision_tokens:
            image = bench.image(tokens)

            def cold(image: Any = image) -> float:
                image.key = bench.rng.bytes(32)
                return bench.cold_ms(image)

            cold_ms = median(cold, runs)
            warm_ms = median(lambda image=image: bench.warm_ms(image), runs)  # type: ignore[misc]
            rows.append({"vision_tokens": image.tokens, "cold_ms": cold_ms, "warm_ms": warm_ms})
        decode = [{"batch": batch, "step_ms": bench.decode_ms(batch)} for batch in batches]
        bytes_per_rank = bench.layout.kv_token * bench.layout.itemsize
        return {
            "ranks": ranks,
            **options,
            "kv_bytes_per_token_and_rank": bytes_per_rank,
            "ttft": rows,
            "decode": decode,
        }
    finally:
        close_bench(bench)


def check(ranks: int, shape: str, device: str, plan: str) -> dict[str, Any]:
    """The same requests on one rank and on several."""
    kv: list[torch.Tensor] = []
    answers: list[list[TokenLogprobs]] = []
    for size in (1, ranks):
        layers = min(CHECK_LAYERS, model_config(shape).text.num_layers)
        bench = make_bench(size, shape, device, CHECK_TOKENS, plan, layers=layers)
        try:
            torch.manual_seed(0)
            image = bench.image(CHECK_TOKENS)
            bench.cold_ms(image)
            extent = bench.store.lookup(ObjectKind.KV, image.key)
            if extent is None:
                raise RuntimeError("the image was not recorded")
            kv.append(bench.arena.kv_view(extent, image.tokens).float().cpu().clone())
            answers.append(_answer(bench, image))
        finally:
            close_bench(bench)
    whole, shard = kv[0][..., : kv[1].shape[3], :], kv[1]
    same = 0
    for one, several in zip(*answers, strict=True):
        if one.token_id != several.token_id:
            break
        same += 1
    pairs = list(zip(*answers, strict=True))[:same]
    return {
        "layers": layers,
        "kv_deviation": float((whole - shard).abs().max() / whole.abs().max()),
        "tokens": CHECK_ANSWER,
        "tokens_that_agree": same,
        "logprob_deviation": max((abs(a.logprob - b.logprob) for a, b in pairs), default=None),
    }


def _answer(bench: Bench, image: Any) -> list[TokenLogprobs]:
    sampling = SamplingParams(max_tokens=CHECK_ANSWER, ignore_eos=True, logprobs=1)
    generation = msgspec.structs.replace(bench._generation([image]), sampling=sampling)
    embedding = bench.store.lookup(ObjectKind.EMBEDDING, image.key, pin=True)
    if embedding is None:
        raise RuntimeError("the image is not in the store")
    bench.engine.add(generation, time.monotonic())
    drawn: list[TokenLogprobs] = []
    while bench.engine.has_work():
        for event in bench.engine.step(time.monotonic()):
            if isinstance(event, Admitted):
                bench.engine.provide(generation.request_id, 0, Compute(embedding))
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, TokenEvent) and event.logprobs is not None:
                drawn.append(event.logprobs)
    return drawn


# -- sums ---------------------------------------------------------------------------------------------------------


def reduce_figures(ranks: int, shape: str, device: str) -> dict[str, Any]:
    """Sums over all ranks, each in a process of its own."""
    store = host_store(HOST)
    others = [
        subprocess.Popen(command("reduce", rank, ranks, shape, Processes().device(rank, device), store.port))
        for rank in range(1, ranks)
    ]
    try:
        rows = _reduce(Collective(store, HOST, 0, ranks, torch.device(device)), shape, torch.device(device))
    finally:
        for other in others:
            other.kill()
            other.wait()
    text = model_config(shape).text
    return {"hidden": text.hidden_size, "sums_per_pass": 2 * text.num_layers, "rows": rows}


def _reduce(collective: Collective, shape: str, device: torch.device) -> list[dict[str, Any]]:
    cuda = device.type == "cuda"
    hidden, dtype = model_config(shape).text.hidden_size, torch.bfloat16 if cuda else torch.float32
    figures = []
    for rows in REDUCE_ROWS:
        x = torch.zeros(rows, hidden, device=device, dtype=dtype)
        times = []
        for _ in range(WARM_UP + REDUCE_RUNS):
            if cuda:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            collective.all_reduce(x)
            if cuda:
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - started) * 1e6)
        figures.append({"rows": rows, "bytes": x.nbytes, "us": statistics.median(times[WARM_UP:])})
    return figures


# -- transfers ----------------------------------------------------------------------------------------------------


def _transfer_layout(ranks: int, device: str) -> KVLayout:
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return KVLayout(1, 1, 1, 1, dtype, "benchmark", tp_size=ranks)


def _arena_worker(ranks: int, device: str, nbytes: int) -> tuple[ShardGroup, ShardedTransport, torch.Tensor]:
    """A worker without a model: an arena and a transport on every rank, filled with what no other arena holds."""
    from vlcache_dist.assembly import nixl_transport

    layout = _transfer_layout(ranks, device)
    group = ShardGroup(Processes(command("arena")), ranks)
    try:
        worker_id = f"bench#{uuid.uuid4().hex[:12]}"
        arena = torch.empty(nbytes // layout.itemsize, device=device, dtype=getattr(torch, layout.dtype))
        peers = open_arenas(group, arena, layout, worker_id)
        transport = ShardedTransport(_filled(nixl_transport)(worker_id, arena, layout), group, peers)
    except BaseException:
        group.close()
        raise
    return group, transport, arena


def _filled(make: Callable[[str, torch.Tensor, KVLayout], Transport]) -> Callable[..., Transport]:
    def filled(worker_id: str, arena: torch.Tensor, layout: KVLayout) -> Transport:
        transport = make(worker_id, arena, layout)
        arena.view(torch.uint8).random_(0, 256)
        if arena.is_cuda:
            torch.cuda.synchronize(arena.device)
        return transport

    return filled


def hold(ranks: int, device: str, nbytes: int) -> None:
    """The worker that is read from: until stdin ends. Tells its endpoint, then every size's checksum."""
    group, transport, _ = _arena_worker(ranks, device, nbytes)
    try:
        print(base64.b64encode(msgspec.msgpack.encode(transport.info)).decode(), flush=True)
        for line in sys.stdin:
            print(transport.checksum(0, int(line)).hex(), flush=True)
    finally:
        transport.close()
        group.close()


def transfer_figures(ranks: int, device: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """READs by a worker whose first rank is on ``device`` from one whose first rank is on the GPU behind it. Raises
    RuntimeError if other bytes arrive than were there."""
    there = Processes().device(1, device)
    holder = subprocess.Popen(
        command("hold", ranks, there, max(sizes)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    group: ShardGroup | None = None
    try:
        assert holder.stdin is not None and holder.stdout is not None
        group, transport, _ = _arena_worker(ranks, device, max(sizes))
        peer = msgspec.msgpack.decode(base64.b64decode(holder.stdout.readline()), type=PeerInfo)
        transport.connect(peer)
        rows = []
        for nbytes in sizes:

            def read(nbytes: int = nbytes) -> float:
                started = time.perf_counter()
                transport.read(peer, [Piece(0, 0, nbytes)], READ_S).future.result()
                return time.perf_counter() - started

            seconds = median(read, READ_RUNS)
            print(nbytes, file=holder.stdin, flush=True)
            if transport.checksum(0, nbytes).hex() != holder.stdout.readline().strip():
                raise RuntimeError(f"a READ of {nbytes} bytes brought other bytes")
            rows.append({"bytes": nbytes, "median_us": seconds * 1e6, "gbps": ranks * nbytes / seconds / 1e9})
        transport.close()
        return rows
    finally:
        if group is not None:
            group.close()
        holder.communicate()


# -- the report ---------------------------------------------------------------------------------------------------


def run(
    shape: str,
    device: str,
    ranks: Sequence[int],
    vision_tokens: Sequence[int],
    plan: str,
    runs: int,
    batches: Sequence[int],
    graphs: bool = False,
    read_bytes: Sequence[int] = READ_BYTES,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """The report. ``device``: ``cpu`` or the first GPU, ``cuda:0``. ``ranks``: sizes to measure engines with; the
    largest one is checked, summed over and read with. ``graphs``: measure sharded engines with CUDA graphs as well.
    ``save`` gets the report after every part."""
    most = max(ranks)
    parts: dict[str, Callable[[], Any]] = {}
    if most > 1:
        parts |= {
            "check": lambda: check(most, shape, device, plan),
            "all_reduce": lambda: reduce_figures(most, shape, device),
        }
    for size in ranks:
        parts[f"engine_{size}"] = lambda size=size: engine_figures(  # type: ignore[misc]
            size, shape, device, vision_tokens, plan, runs, batches
        )
    if most > 1:
        parts["transfer"] = lambda: transfer_figures(most, device, read_bytes)
    if most > 1 and graphs:
        parts[f"engine_{most}_graphs"] = lambda: engine_figures(
            most, shape, device, vision_tokens, plan, runs, batches, graphs=True
        )
    report: dict[str, Any] = {"machine": machine(device), "shape": shape, "plan": plan, "runs": runs}
    for name, measure in parts.items():
        try:
            report[name] = measure()
        except Exception as error:
            log.exception("%s", name)
            report[name] = {"error": f"{type(error).__name__}: {error}"}
        save(report)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes of the next part want it
    return report


def _follow(shape: str, layers: int) -> None:
    def load(
        asked: protocol.Load, shard: Shard, collective: Collective, device: torch.device, layout: KVLayout
    ) -> LanguageShard:
        config = model_config(shape, layers or None)
        model, _ = random_shard(config, shard, collective.all_reduce, device, getattr(torch, layout.dtype))
        return model

    follow(_invited(), _no_transport, load, leave_soon)


def _no_transport(worker_id: str, arena: torch.Tensor, layout: KVLayout) -> Transport:
    raise RuntimeError("nothing is read from this follower")


def _hold_arena() -> None:
    from vlcache_dist.assembly import nixl_transport

    follow(_invited(), _filled(nixl_transport), on_leader_lost=leave_soon)


def _invited() -> Invitation:
    return msgspec.json.decode(sys.stdin.readline(), type=Invitation)


def _sum(rank: int, ranks: int, shape: str, device: str, port: int) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    _reduce(Collective(join_store(HOST, port), HOST, rank, ranks, torch.device(device)), shape, torch.device(device))


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["follow", shape, layers]:
            _follow(shape, int(layers))
        case ["arena"]:
            _hold_arena()
        case ["reduce", rank, ranks, shape, device, port]:
            _sum(int(rank), int(ranks), shape, device, int(port))
        case ["hold", ranks, device, nbytes]:
            hold(int(ranks), device, int(nbytes))
