"""What cannot start says so in one sentence, exits with an error and leaves nothing running."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import leftovers
import pytest

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def _no_survivors() -> Iterator[None]:
    yield
    leftovers.kill()


def serve(folder: Path, *arguments: str, **sections: dict[str, object]) -> subprocess.CompletedProcess[str]:
    config = folder / "settings.json"
    config.write_text(json.dumps(sections))
    command = [
        sys.executable,
        "-m",
        "vlcache_dist.cli",
        "serve",
        *arguments,
        "--config",
        str(config),
        "--device",
        "cpu",
    ]
    return subprocess.run(command, env=leftovers.marked(), capture_output=True, text=True, timeout=120, check=False)


def check(done: subprocess.CompletedProcess[str], why: str) -> None:
    assert done.returncode not in (0, 130) and re.search(why, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert leftovers.gone(), "something is still running"


def test_too_few_gpus(tmp_path: Path) -> None:
    check(serve(tmp_path, "--port", "0", "--gpus-per-worker", "1"), "need 4 GPUs, but the cluster has 0")


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    done = serve(tmp_path, "--port", "0", engine={"store_bytes": 1 << 50, "kv_bytes": 1 << 20})
    check(done, r"does not fit: .* GiB and the store \(engine\.store_bytes\) 1048576\.00 GiB")


def test_an_unknown_model(tmp_path: Path) -> None:
    check(serve(tmp_path, str(tmp_path / "nowhere"), "--port", "0"), "nowhere")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check(serve(tmp_path, "--port", str(taken.getsockname()[1])), "port")


def test_an_open_endpoint_without_keys(tmp_path: Path) -> None:
    check(serve(tmp_path, "--port", "0", "--host", "0.0.0.0"), "API key")
