"""What must be so before any test module is imported."""

from __future__ import annotations

import os

import torch

# Chosen when a kernel module is imported, whichever test imports it first (see tests/kernels/conftest.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The suite is meant for small machines, and results must not depend on how work is split over cores.
torch.set_num_threads(1)
