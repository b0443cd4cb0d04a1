"""Benchmarks between workers as the system places them: Ray actors, on CUDA one GPU each."""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from vlcache_dist.bench.remote import BenchWorker
from vlcache_dist.bench.transfer import DEADLINE_S, LAYOUT, machine, measure, nixl_version, plain_copies, summary
from vlcache_dist.cache_directory.server import DirectoryServer
from vlcache_dist.errors import VLCacheError
from vlcache_dist.transfer.base import PeerInfo, Piece
from vlcache_dist.transfer.checksum import checksum
from vlcache_dist.transfer.nixl import NixlTransport

START_S, CALL_S = 180.0, 300.0


@ray.remote(num_cpus=1, max_restarts=0)
class _Worker(BenchWorker):
    """A prefill worker. Ray runs its coroutines on one event loop."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        torch.set_num_threads(1)
        super().__init__(*arguments, **options)


@ray.remote(num_cpus=1, max_restarts=0)
class _Peer:
    """An arena that is read from, or that reads."""

    def __init__(self, name: str, device: str, nbytes: int) -> None:
        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(0)
        self._arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._transport = NixlTransport(f"{name}#{uuid.uuid4().hex}", self._arena, LAYOUT)

    def fill(self) -> PeerInfo:
        torch.arange(self._arena.numel() // 8, out=self._arena.view(torch.int64))
        if self._arena.is_cuda:
            torch.cuda.synchronize()
        return self._transport.info

    def connect(self, peer: PeerInfo) -> None:
        self._transport.connect(peer)

    def read(self, peer: PeerInfo, nbytes: int, pieces: int, seconds: float) -> list[float]:
        """Bytes/s of each repetition of a READ of ``nbytes`` in so many descriptors."""
        size = nbytes // pieces
        parts = [Piece(i * size, i * size, size) for i in range(pieces)]
        return measure(lambda: self._transport.read(peer, parts, DEADLINE_S).future.result(), nbytes, seconds)

    def check(self, peer: PeerInfo, nbytes: int) -> bool:
        """Whether a READ brings what ``fill`` wrote at the other end."""
        self._arena[:nbytes].zero_()
        if self._arena.is_cuda:
            torch.cuda.synchronize()
        self._transport.read(peer, [Piece(0, 0, nbytes)], DEADLINE_S).future.result()
        expected = torch.arange(nbytes // 8, device=self._arena.device)
        return bool(torch.equal(self._arena[:nbytes].view(torch.int64), expected))

    def checksum_us(self, nbytes: int) -> float:
        """One checksum of so many bytes, the median of several."""
        return nbytes * 1e6 / statistics.median(measure(lambda: checksum(self._arena, 0, nbytes), nbytes, 0.1))

    def close(self) -> None:
        self._transport.close()


def transfer(device: str, sizes: Sequence[int], seconds: float, image_bytes: int) -> dict[str, Any]:
    """READs between two actors, and the plain copy of the same bytes by one process that sees both memories. Raises
    RuntimeError if a READ brings other bytes than were to be read."""
    with _ray(device):
        options = {"num_gpus": 1 if device == "cuda" else 0}
        biggest = max(*sizes, image_bytes)
        made: Any = _Peer
        holder, reader = (made.options(**options).remote(name, device, biggest) for name in ("holder", "reader"))
        peer = ray.get(holder.fill.remote(), timeout=START_S)
        ray.get(reader.connect.remote(peer), timeout=START_S)
        reads = {
            (nbytes, pieces): ray.get(reader.read.remote(peer, nbytes, pieces, seconds), timeout=CALL_S)
            for nbytes, pieces in [*((nbytes, 1) for nbytes in sizes), (image_bytes, 1), (biggest, 8)]
        }
        if not ray.get(reader.check.remote(peer, biggest), timeout=CALL_S):
            raise RuntimeError("the bytes that were read are not those of the holder")
        checksums = {n: ray.get(reader.checksum_us.remote(n), timeout=CALL_S) for n in (image_bytes, biggest)}
        for actor in (reader, holder):
            ray.get(actor.close.remote(), timeout=CALL_S)
            ray.kill(actor)
    copies = plain_copies(device, [*sizes, image_bytes], seconds)
    rows = [summary(nbytes, pieces, speeds, copies[nbytes]) for (nbytes, pieces), speeds in reads.items()]
    return {
        "machine": machine(),
        "device": device,
        "actors": "ray",
        "ucx_tls": os.environ.get("UCX_TLS", "default"),
        "torch": str(torch.__version__),
        "nixl": nixl_version(),
        "peer_copy_gbps": max(row["copy_gbps"] for row in rows),
        "image": next(row for row in rows if row["bytes"] == image_bytes),
        "rows": rows,
        "checksum": [{"bytes": n, "us": us, "gbps": n / us / 1e3} for n, us in checksums.items()],
    }


def ttft_remote(
    shape: str,
    device: str,
    vision_tokens: Sequence[int],
    plan: str,
    runs: int,
    limits: dict[str, Any] | None = None,
    layers: int | None = None,
) -> dict[str, Any]:
    """Warm requests whose image lies on another actor's GPU, beside ones whose image is local. A size that fails is
    reported with its traceback; the others go on."""
    with _ray(device):
        return asyncio.run(_ttft_remote(shape, device, vision_tokens, plan, runs, limits or {}, layers))


async def _ttft_remote(
    shape: str,
    device: str,
    vision_tokens: Sequence[int],
    plan: str,
    runs: int,
    limits: dict[str, Any],
    layers: int | None,
) -> dict[str, Any]:
    directory = DirectoryServer()
    address = await directory.start()
    options = {"num_gpus": 1 if device == "cuda" else 0}
    made: Any = _Worker
    holder, reader = (
        made.options(**options).remote(name, shape, device, max(vision_tokens), layers)
        for name in ("holder-0", "reader-0")
    )
    try:
        started = time.perf_counter()
        holder_id, _ = await asyncio.gather(holder.start.remote(address, limits), reader.start.remote(address, limits))
        link = await asyncio.wait_for(reader.met.remote(holder_id), START_S)
        start_s = time.perf_counter() - started
        rows: list[dict[str, Any]] = []
        for number, tokens in enumerate(vision_tokens):
            key = bytes([number + 1]) * 32
            try:
                await asyncio.wait_for(holder.record.remote(key, tokens), CALL_S)
                row = await asyncio.wait_for(reader.measure.remote(key, tokens, plan, runs), CALL_S)
                row["same_token"] = await asyncio.wait_for(reader.same_token.remote(key, tokens, plan), CALL_S)
            except (VLCacheError, ray.exceptions.RayError, RuntimeError, TimeoutError):
                row = {"vision_tokens": tokens, "error": traceback.format_exc()}
            rows.append(row)
        return {
            "machine": machine(),
            "shape": shape,
            "device": device,
            "plan": plan,
            "runs": runs,
            "limits": limits,
            "torch": str(torch.__version__),
            "nixl": nixl_version(),
            "start_s": start_s,
            "link": link,
            "rows": rows,
        }
    finally:
        for actor in (reader, holder):
            ray.kill(actor)
        await directory.close()


class _ray:
    """A Ray of its own for the time of a benchmark, unless one is joined already."""

    def __init__(self, device: str) -> None:
        self._gpus = 2 if device == "cuda" else 0

    def __enter__(self) -> None:
        self._own = not ray.is_initialized()
        if self._own:
            path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=self._gpus,
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
            )

    def __exit__(self, *why: object) -> None:
        if self._own:
            ray.shutdown()
