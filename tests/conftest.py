"""What must be so before any test module is imported."""

from __future__ import annotations

import os

import pytest
import torch

# Chosen when a kernel module is imported, whichever test imports it first (see tests/kernels/conftest.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The suite is meant for small machines, and results must not depend on how work is split over cores.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may run beside what under pytest-xdist (``make test``). Tests that start a Ray cluster go one after the
    other, and begin first because they take longest; those that need a GPU too; of the others a file stays together."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)
    for item in items:
        alone = [name for name in ("cluster", "gpu") if item.get_closest_marker(name)]
        item.add_marker(pytest.mark.xdist_group(alone[0] if alone else item.path.stem))
