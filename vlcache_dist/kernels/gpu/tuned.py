"""What ``benchmarks/tune.py`` found to be fastest on a kind of GPU, as data beside the code.

``tuned/<name of the device>.json`` is a report of that benchmark as it was written; of a device without one nothing is
known, and kernels take their defaults. Adopting a measurement is copying its report there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("tuned")


@dataclass(frozen=True, slots=True)
class Choices:
    """``attention``: fields of an ``AttentionConfig`` for few rows, None for the default. ``swiglu``: (inputs,
    outputs) -> (rows from which the fused kernel is ahead of the library, fields of its ``SwigluConfig``)."""

    attention: Mapping[str, Any] | None = None
    swiglu: Mapping[tuple[int, int], tuple[int, Mapping[str, Any]]] | None = None


NOTHING = Choices()


def file_name(device_name: str) -> str:
    """Of the report that holds for devices called so."""
    return f"{'-'.join(device_name.lower().split())}.json"


def read(file: Path) -> Choices:
    """The choices of a report; ``NOTHING`` if there is none. Raises KeyError if it is no such report."""
    if not file.exists():
        return NOTHING
    chosen = json.loads(file.read_text())["chosen"]
    swiglu = {(each["inputs"], each["outputs"]): (each["from_rows"], each["config"]) for each in chosen["swiglu"]}
    return Choices(chosen["attention"], swiglu)


@lru_cache(maxsize=16)
def _of(index: int) -> Choices:
    return read(FOLDER / file_name(torch.cuda.get_device_name(index)))


def choices(tensor: torch.Tensor) -> Choices:
    """For the device that holds ``tensor``."""
    return _of(tensor.device.index or 0) if tensor.is_cuda else NOTHING
