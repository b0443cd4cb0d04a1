"""How fast one process reads another's arena through NIXL, beside a plain copy of the same bytes.

A row is one size: ``gbps`` is the best and ``median_gbps`` the median of all READs, each timed from the call to its
completed future, in 10^9 bytes/s; ``copy_gbps`` and ``copy_median_gbps`` say the same of ``Tensor.copy_``; ``share`` is
median over median. ``peer_copy_gbps`` is the plain copy at the largest size. ``UCX_TLS`` selects what UCX may use
(``tcp,self`` for the loopback network).

``python -m vlcache_dist.bench.transfer DEVICE NBYTES`` is the process that is read from.
"""

from __future__ import annotations

import base64
import os
import platform
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch

from vlcache_dist.bench.shapes import model_config
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece
from vlcache_dist.transfer.huge_pages import advise_huge_pages
from vlcache_dist.transfer.nixl import NixlTransport

IMAGE_TOKENS = 1600
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30]
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, hidden=1, dtype="bfloat16", model="benchmark")
DEADLINE_S = 60.0
WARMUP = 3


def serve(device: str, nbytes: int) -> None:
    """The process that is read from: until its stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # NIXL may log to stdout
    arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
    transport = NixlTransport(f"holder#{uuid.uuid4().hex}", arena, LAYOUT)
    torch.arange(nbytes // 8, out=arena.view(torch.int64))
    if arena.is_cuda:
        torch.cuda.synchronize(arena.device)
    print(base64.b64encode(msgspec.msgpack.encode(transport.info)).decode(), file=replies, flush=True)
    sys.stdin.read()
    transport.close()


def image_bytes(shape: str) -> int:
    """KV in bf16 of an image of ``IMAGE_TOKENS`` of a model of that shape (7B: 92 MB)."""
    text = model_config(shape).text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * IMAGE_TOKENS * 2


def measure(work: Callable[[], object], nbytes: int, seconds: float) -> list[float]:
    """Bytes/s of each repetition, for about so long, at least five times."""
    for _ in range(WARMUP):
        work()
    speeds: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(speeds) < 5:
        started = time.perf_counter()
        work()
        speeds.append(nbytes / (time.perf_counter() - started))
    return speeds


def run(device: str = "cpu", sizes: Sequence[int] = SIZES, seconds: float = 1.0) -> dict[str, Any]:
    """The report. ``device``: ``cpu``, or ``cuda`` for GPU 0 reading GPU 1's memory. ``sizes``: bytes, multiples of 8,
    in ascending order. ``seconds``: per size and kind of copy. Raises RuntimeError if a READ brings other bytes than
    were to be read."""
    here, there = ("cuda:0", "cuda:1") if device == "cuda" else ("cpu", "cpu")
    torch.set_num_threads(1)
    biggest = max(sizes)
    command = [sys.executable, "-m", "vlcache_dist.bench.transfer", there, str(biggest)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        peer = msgspec.msgpack.decode(base64.b64decode(holder.stdout.readline()), type=PeerInfo)
        arena = torch.empty(biggest, dtype=torch.uint8, device=here)
        transport = NixlTransport(f"reader#{uuid.uuid4().hex}", arena, LAYOUT)
        source = torch.empty(biggest, dtype=torch.uint8, device=there)
        if device == "cpu":  # the copy that READs are compared with has the same kind of pages
            advise_huge_pages(source.data_ptr(), biggest)
        torch.arange(biggest // 8, out=source.view(torch.int64))
        transport.connect(peer)
        rows = [row(transport, peer, arena, source, nbytes, seconds) for nbytes in sizes]
        transport.read(peer, [Piece(0, 0, biggest)], DEADLINE_S).future.result()
        if not torch.equal(arena, source.to(here)):
            raise RuntimeError("the bytes that were read are not those of the holder")
        transport.close()
    finally:
        holder.kill()
        holder.wait()
    return {
        "machine": machine(),
        "device": device,
        "ucx_tls": os.environ.get("UCX_TLS", "default"),
        "torch": str(torch.__version__),
        "nixl": nixl_version(),
        "peer_copy_gbps": rows[-1]["copy_gbps"],
        "rows": rows,
    }


def row(
    transport: NixlTransport, peer: PeerInfo, arena: torch.Tensor, source: torch.Tensor, nbytes: int, seconds: float
) -> dict[str, Any]:
    def read() -> None:
        transport.read(peer, [Piece(0, 0, nbytes)], DEADLINE_S).future.result()

    return summary(nbytes, 1, measure(read, nbytes, seconds), _copies(arena, source, nbytes, seconds))


def plain_copies(device: str, sizes: Sequence[int], seconds: float) -> dict[int, list[float]]:
    """Bytes/s of copies from the one memory to the other (``device`` as in ``run``), by this process alone."""
    here, there = ("cuda:0", "cuda:1") if device == "cuda" else ("cpu", "cpu")
    arena, source = (torch.empty(max(sizes), dtype=torch.uint8, device=place) for place in (here, there))
    for tensor in (arena, source):
        if device == "cpu":
            advise_huge_pages(tensor.data_ptr(), tensor.numel())
        tensor.fill_(1)
    return {nbytes: _copies(arena, source, nbytes, seconds) for nbytes in sizes}


def summary(nbytes: int, descriptors: int, reads: Sequence[float], copies: Sequence[float]) -> dict[str, Any]:
    """A row of the report from both kinds of bytes/s."""
    read_median, copy_median = statistics.median(reads), statistics.median(copies)
    found = {
        "bytes": nbytes,
        "descriptors": descriptors,
        "gbps": round(max(reads) / 1e9, 3),
        "median_gbps": round(read_median / 1e9, 3),
        "median_us": round(nbytes / read_median * 1e6, 1),
        "copy_gbps": round(max(copies) / 1e9, 3),
        "copy_median_gbps": round(copy_median / 1e9, 3),
        "share": round(read_median / copy_median, 3),
    }
    print(found, file=sys.stderr)
    return found


def _copies(arena: torch.Tensor, source: torch.Tensor, nbytes: int, seconds: float) -> list[float]:
    def copy() -> None:
        arena[:nbytes].copy_(source[:nbytes])
        if arena.is_cuda:
            torch.cuda.synchronize(arena.device)

    return measure(copy, nbytes, seconds)


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def nixl_version() -> str:
    for package in ("nixl-cu13", "nixl-cu12", "nixl"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.argv[1], int(sys.argv[2]))
