"""Compiled forms of the Triton kernels, without a GPU: see ``kernel_forms``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are recorded on CPU tensors")
pytest.importorskip("triton", reason="only Linux has it")


def forms(*arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kernel_forms.py")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=True)
    return json.loads(done.stdout)


def test_warm_up_compiles_every_form_that_traffic_needs() -> None:
    warm = forms()
    assert warm["late"] == {} and sum(warm["ahead"].values()) < 50, "forms are few, and all are made at start"
    assert len(forms("--cold")["late"]) >= 8, "without a warm-up, traffic does compile"


def test_warm_up_compiles_what_a_measurement_has_chosen() -> None:
    warm = forms("--tuned")
    assert warm["late"] == {} and warm["ahead"]["_swiglu_kernel"] == 2, "the language model's and the tower's"
    assert "_swiglu_kernel" in forms("--tuned", "--cold")["late"]


def test_every_kernel_compiles_for_hopper() -> None:
    """To machine code, without a GPU; long queries use the matrix units and the bulk copy engine."""
    compiled = forms("--compile", "--tuned")
    assert len(compiled) == 12 and all(kernel["bytes"] > 1000 for kernel in compiled.values())
    for name in ("_segment_kernel", "_packed_kernel", "_swiglu_kernel"):
        assert compiled[name]["wgmma"] > 0 and compiled[name]["tma"] > 0
