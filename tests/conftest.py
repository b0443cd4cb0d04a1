"""What must be so before any test module is imported."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

# Chosen when a kernel module is imported, whichever test imports it first (see tests/kernels/conftest.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the suite in the background has SIGINT ignored in it, and so in the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite is meant for small machines, and results must not depend on how work is split over cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a Ray cluster begin first, because they take longest."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


@functools.cache
def room(file: str) -> str:
    """Files of one room go one after the other. Marks are read off the file: who deals out tests knows only names."""
    text = (ROOT / file).read_text()
    if "pytest.mark.cluster" in text:
        return "cluster"
    return "gpu" if torch.cuda.is_available() and "pytest.mark.gpu" in text else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What may run beside what (``make test``): files, but those that start a Ray cluster or need the GPU in turn."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Rooms(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return room(nodeid.partition("::")[0])

    return Rooms(config, log)
