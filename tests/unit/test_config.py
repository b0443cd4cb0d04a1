from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlcache_dist.config import EngineSettings, MediaSettings, ServeSettings, Settings
from vlcache_dist.errors import ConfigError
from vlcache_dist.types import ReuseMode


def test_defaults_are_the_documented_ones() -> None:
    settings = Settings.read()
    assert settings.engine.reuse is ReuseMode.APPROX and settings.engine.plan == "guarded"
    assert (settings.serve.encoders, settings.serve.prefills, settings.serve.decodes) == (1, 2, 1)


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.read().engine.block_size = 32  # type: ignore[misc]


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_file_then_overrides(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text(json.dumps({"engine": {"block_size": 32, "plan": "none"}, "serve": {"port": 9000}}))
    settings = Settings.read(path, engine={"plan": "uniform:2"})
    assert (settings.engine.block_size, settings.engine.plan, settings.serve.port) == (32, "uniform:2", 9000)


def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert Settings.read(path) == Settings()


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (EngineSettings, {"blocksize": 16}, ["blocksize", "16", "block_size"]),
        (EngineSettings, {"block_size": 0}, ["block_size", "0"]),
        (EngineSettings, {"reuse": "always"}, ["reuse", "always", "approx"]),
        (MediaSettings, {"allow_networks": ["10.0.0.0/33"]}, ["allow_networks", "10.0.0.0/33"]),
        (ServeSettings, {"transfer_timeout_s": 20.0}, ["transfer_timeout_s", "lease_s"]),
        (ServeSettings, {"heartbeat_s": 2.0}, ["heartbeat_s", "expiry_s"]),
        (Settings, {"serve": {"ports": 1}}, ["serve.ports", "port"]),
        (Settings, {"server": {}}, ["server", "serve"]),
    ],
)
def test_errors_name_key_value_and_fix(section: type, values: dict, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        section.of(**values)  # type: ignore[attr-defined]
    assert all(name in str(caught.value) for name in named), str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "{"), ("a.yaml", "a: ["), ("a.toml", "x = 1"), ("a.json", "[1]"), ("a.yaml", "text")],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        Settings.read(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        Settings.read(tmp_path / "nowhere.json")


def test_ranks_do_not_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_worker must be 1 with engine\.tensor_parallel"):
        Settings.read(engine={"tensor_parallel": 2}, serve={"gpus_per_worker": 0.5})
    assert Settings.read(engine={"tensor_parallel": 2}, serve={"gpus_per_worker": 1}).engine.tensor_parallel == 2
