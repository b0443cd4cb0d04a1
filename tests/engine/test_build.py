"""Memory of an engine: bytes as given, a share of what is free otherwise."""

from __future__ import annotations

import pytest
import torch

from vlcache_dist.config import EngineSettings
from vlcache_dist.engine import build
from vlcache_dist.engine.build import CPU_KV_BYTES, CPU_STORE_BYTES, build_engine, build_store
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.llm import LLM

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, hidden=16, dtype="float32", model="m")


def test_bytes_as_given_and_defaults_on_cpu() -> None:
    arena, store = build_store(LAYOUT, EngineSettings(store_bytes=1 << 20), torch.device("cpu"))
    assert arena.tensor.nbytes == 1 << 20 == store.stats().total * 4
    assert build_store(LAYOUT, EngineSettings(), torch.device("cpu"))[0].tensor.nbytes == CPU_STORE_BYTES


def test_a_share_of_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arena takes its share before weights are loaded, pages theirs of what is free then."""
    monkeypatch.setattr(build, "free_bytes", lambda device: 10 << 20)
    device = torch.device("meta")
    arena, _ = build_store(LAYOUT, EngineSettings(store_fraction=0.25), device)
    assert arena.tensor.nbytes == (10 << 20) // 4


def test_pages_of_an_engine() -> None:
    llm = LLM("tiny", "cpu", engine=EngineSettings(store_bytes=4 << 20))
    pages = llm.engine.runner.pages
    block = pages.nbytes // pages.shape[2]
    assert CPU_KV_BYTES - block < pages.nbytes <= CPU_KV_BYTES
    small = build_engine(
        llm.engine.runner.model, llm.config, EngineSettings(kv_bytes=8 << 20), llm.arena, llm.store, max_model_len=64
    )
    assert small.runner.pages.nbytes <= 8 << 20 and small.config.max_model_len == 64
