"""Settings: read once, frozen, unknown keys refused.

Every section is a pydantic model whose field descriptions are the documentation. ``Settings.read`` takes keyword
arguments and, optionally, a JSON or YAML file, and is the only place where configuration enters the program. A wrong
setting raises ``ConfigError``, which names the key, the value and the fix.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlcache_dist.errors import ConfigError
from vlcache_dist.types import ReuseMode


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The section from keyword arguments. Raises ConfigError."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from error


class ModelSettings(_Section):
    """Which model, and how its numbers are kept."""

    model: str = Field(default="tiny", description="'tiny' (bundled), a checkpoint folder, or a hub name")
    revision: str | None = Field(default=None, description="hub revision; None: the default branch")
    served_name: str | None = Field(default=None, description="model id in the API; None: the value of `model`")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="'auto', 'cpu' or 'cuda[:N]'")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of weights, KV and embeddings; auto: float32 on CPU, bfloat16 on CUDA"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="tokens of prompt and answer; None: the model's limit"
    )


class EngineSettings(_Section):
    """Memory and batching of one worker. Sizes in bytes, lengths in tokens."""

    block_size: int = Field(default=16, ge=1, le=256, description="tokens per KV block")
    max_batch_tokens: int = Field(
        default=2048, ge=16, description="rows of one forward pass (longer prompts are chunked)"
    )
    max_sequences: int = Field(default=64, ge=1, description="sequences that one worker runs at a time")
    kv_bytes: int | None = Field(
        default=None, ge=1, description="paged KV; None: `kv_fraction` of device memory, or 256 MiB on CPU"
    )
    kv_fraction: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="share of the memory that weights and arena leave free for paged KV if `kv_bytes` is None",
    )
    store_bytes: int | None = Field(
        default=None,
        ge=1,
        description="arena for image KV, encoder output and staging; None: `store_fraction` of device memory, "
        "or 256 MiB on CPU",
    )
    store_fraction: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="share of free device memory, before weights are loaded, for the arena if `store_bytes` is None",
    )
    graph_start_s: float = Field(
        default=10.0,
        ge=0,
        description="seconds that capturing CUDA graphs may take at a worker's start; the rest are captured when it is "
        "idle, and until then such steps use a larger graph or are launched kernel by kernel",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="ranks (GPUs) that share one language model; it must divide the model's KV heads. The bytes above "
        "count per rank",
    )
    reuse: ReuseMode = Field(default=ReuseMode.APPROX, description="default of requests that do not say")
    plan: str = Field(
        default="guarded",
        description="default recompute plan: guarded (probes that are watched), none, uniform:5, pyramid:..., "
        "file:plan.json",
    )
    donors: Literal["first", "canonical", "background"] = Field(
        default="first",
        description="whose image KV is kept for others. first: of the request that shows a picture first; canonical: "
        "of the picture behind the default system prompt, computed before its first use; background: the same, "
        "computed when the engine is idle, so that a first use is not slower and a second one may reuse",
    )
    guard_budget: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="share of prefill time that comparing approximate requests with full runs may take; what it shows "
        "decides how careful reuse is; 0: nobody looks",
    )
    guard_sampling: float | None = Field(
        default=None, ge=0, le=1, description="share of approximate requests to compare; None: what the budget affords"
    )


class MediaSettings(_Section):
    """Limits on pictures and videos, and where they may be fetched from."""

    max_bytes: int = Field(default=20 << 20, ge=1, description="encoded bytes of one picture or one whole video")
    max_pixels: int = Field(
        default=64_000_000, ge=1, description="width x height of one picture or frame, before resizing"
    )
    max_video_pixels: int = Field(default=512_000_000, ge=1, description="frames x width x height of one video")
    max_frames: int = Field(default=768, ge=1, description="frames of one video")
    max_items: int = Field(default=64, ge=0, description="pictures and videos of one request")
    fetch_urls: bool = Field(default=True, description="fetch http(s) URLs; False: only data URLs are taken")
    allow_networks: tuple[str, ...] = Field(
        default=(), description="CIDR ranges that may be fetched from although they are not public, e.g. 127.0.0.0/8"
    )
    connect_timeout_s: float = Field(default=5.0, gt=0)
    timeout_s: float = Field(default=15.0, gt=0, description="for one item, redirects included")
    max_redirects: int = Field(default=3, ge=0)

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value


class ServeSettings(_Section):
    """The distributed application: pools, ports, deadlines."""

    app_name: str = Field(default="vlcache", description="Ray Serve application and actor name prefix")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535, description="0: a free port")
    address: str | None = Field(default=None, description="a running Ray cluster; None: start one on this machine")
    direct: bool = Field(
        default=False,
        description="the ingress listens on host:port itself, on the node where the application was built, instead of "
        "being behind Serve's HTTP proxy; `vlcache-dist serve` always does so",
    )
    encoders: int = Field(default=1, ge=1)
    prefills: int = Field(default=2, ge=1)
    decodes: int = Field(default=1, ge=0, description="0: the prefill workers decode as well (colocated)")
    ingresses: int = Field(default=1, ge=1, description="HTTP replicas")
    gpus_per_worker: float = Field(
        default=0.0, ge=0, description="GPUs that Ray reserves for each worker, or each rank of it"
    )
    pool_resources: bool = Field(
        default=False,
        description="each worker asks Ray for one of its pool's own resource (encoder_pool, prefill_pool, "
        "decode_pool), so that nodes which offer it are that pool's nodes",
    )
    api_keys: tuple[str, ...] = Field(
        default=(), description="entries '[TENANT] sha256:HEX' (`vlcache-dist api-key` makes them); none: loopback only"
    )
    api_keys_file: str | None = Field(
        default=None, description="file with such entries, one per line, read where an ingress runs"
    )
    placement: Literal["least-ttft", "affinity", "round-robin", "random"] = Field(
        default="least-ttft", description="who prefills a request; the last three are for comparisons"
    )
    directory_shards: int = Field(default=2, ge=1)
    transport: Literal["nixl", "memory"] = Field(
        default="nixl", description="'memory' works inside one process only (tests)"
    )
    max_body_bytes: int = Field(default=64 << 20, ge=1024, description="of one HTTP request")
    max_ongoing: int = Field(default=256, ge=1, description="requests in the ingress; above it: 503")
    request_timeout_s: float = Field(default=120.0, gt=0, description="deadline of a request, from body to last token")
    heartbeat_s: float = Field(default=0.5, gt=0)
    expiry_s: float = Field(default=3.0, gt=0, description="a worker that is silent for so long is gone")
    lease_s: float = Field(default=10.0, gt=0, description="how long a holder promises not to touch what is being read")
    transfer_timeout_s: float = Field(
        default=5.0, gt=0, description="local deadline of one READ; must be below `lease_s`"
    )
    link_floor_gbps: float | None = Field(
        default=None,
        gt=0,
        description="GB/s below which a pair of workers is slow; none: 5 between GPUs of one host, else 0.05",
    )
    refuse_slow_links: bool = Field(
        default=False, description="compute an image anew rather than fetch it over a pair below the floor"
    )

    @model_validator(mode="after")
    def _deadlines(self) -> Self:
        if self.transfer_timeout_s >= self.lease_s:
            raise ValueError("transfer_timeout_s must be below lease_s: a reader must give up before the lease ends")
        if self.heartbeat_s * 2 > self.expiry_s:
            raise ValueError("expiry_s must be at least twice heartbeat_s: one late heartbeat is not a death")
        return self


class Settings(_Section):
    """Everything. Sections can be given as nested mappings."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    media: MediaSettings = MediaSettings()
    serve: ServeSettings = ServeSettings()

    @model_validator(mode="after")
    def _ranks(self) -> Self:
        if self.engine.tensor_parallel > 1 and 0 < self.serve.gpus_per_worker < 1:
            raise ValueError("serve.gpus_per_worker must be 1 with engine.tensor_parallel: ranks cannot share a GPU")
        return self

    @classmethod
    def read(cls, path: str | Path | None = None, **overrides: Any) -> Settings:
        """Settings from a JSON or YAML file (``.json``, ``.yaml``, ``.yml``), then ``overrides``, nested mappings
        by section, on top. Raises ConfigError."""
        values = _read_file(Path(path)) if path is not None else {}
        for section, given in overrides.items():
            base = values.get(section)
            values[section] = {**base, **given} if isinstance(base, dict) and isinstance(given, dict) else given
        return cls.of(**values)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read settings from {path}: {error.strerror or error}") from error
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text) or {}
        else:
            raise ConfigError(f"{path}: settings are read from .json, .yaml or .yml files, not {path.suffix!r}")
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except Exception as error:
        if isinstance(error, ConfigError) or type(error).__module__.split(".")[0] != "yaml":
            raise
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of sections is wanted, not {type(values).__name__}")
    return values


def _explain(error: ValidationError, section: type[BaseModel]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or section.__name__
        if item["type"] == "extra_forbidden":
            known = _known_keys(section, item["loc"][:-1])
            lines.append(f"{key}: unknown setting (value {item['input']!r}); known here: {', '.join(known)}")
        else:
            lines.append(f"{key} = {item['input']!r}: {item['msg']}")
    return "; ".join(lines)


def _known_keys(section: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    return sorted(section.model_fields)
