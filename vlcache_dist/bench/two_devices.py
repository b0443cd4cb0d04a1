"""Two devices of one machine as two nodes of a Ray cluster, and the file that a benchmark of them writes."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEVICES = 2


@contextmanager
def two_nodes(device: str) -> Iterator[str]:
    """A Ray cluster with a node per device on this machine, which pins pools to devices; yields its address."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {
        "num_cpus": 16,
        "object_store_memory": 200_000_000,
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args={**common, "num_gpus": 0})
    try:
        for number in range(DEVICES):
            offered = {"encoder_pool": 1, "prefill_pool": 1} | ({"decode_pool": 1} if number else {})
            visible = {"CUDA_VISIBLE_DEVICES": str(number)} if device == "cuda" else {}
            gpus = 1 if device == "cuda" else 0
            cluster.add_node(**common, num_gpus=gpus, resources=offered, env_vars={**os.environ, **visible})
        yield cluster.address
    finally:
        cluster.shutdown()


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    found |= {name: version(name) for name in ("torch", "transformers", "ray")}
    if device == "cuda":
        ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["devices"] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return found


class Report:
    """The file: written again whenever something is added."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self.contents: dict[str, Any] = {**about, "rows": [], "errors": []}

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.contents["rows"] += rows
        self.write()

    def fail(self, what: str, error: BaseException) -> None:
        print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        self.contents["errors"].append(f"{what}: {type(error).__name__}: {error}")
        self.write()

    def write(self) -> None:
        self._path.write_text(json.dumps(self.contents, indent=1) + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
