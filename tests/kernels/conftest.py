"""Triton kernels run compiled where there is a GPU and in Triton's interpreter where there is none.

The interpreter is chosen when a kernel is decorated, so the variable is set before any kernel module is imported. Its
matrix product does not know bfloat16 (it multiplies the bits), so products are tested in float16 and float32 there.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("triton") is None:  # only Linux has it
    collect_ignore = ["test_segment_attention.py", "test_write_kernels.py", "test_pointwise.py", "test_gemv.py"]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Seeded by the test's name: deterministic, and different in every test."""
    return torch.Generator().manual_seed(sum(map(ord, request.node.name)))
