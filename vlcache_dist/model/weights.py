"""Checkpoints: safetensors in a folder or on the hub, verified before a byte is loaded, read straight to the device.

Names are understood in the form transformers 5 writes (``model.language_model.*``, ``model.visual.*``, canonical here)
and in the hub's (``model.*``, ``visual.*``). Storage may be bf16, fp16 or fp32 whatever the model computes in.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open

from vlcache_dist.errors import CheckpointError
from vlcache_dist.model.config import ModelConfig
from vlcache_dist.model.language import LanguageModel
from vlcache_dist.model.vision import VisionTower

BUNDLED = "tiny"
_FLOATS = ("BF16", "F16", "F32")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_SAMPLES, _SAMPLE_BYTES = 8, 4096


def resolve(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``tiny`` (bundled with the package), a local folder, or a hub name, which is
    downloaded into the hub's cache. Raises CheckpointError if there is no such thing or the hub cannot be reached."""
    if name == BUNDLED:
        return Path(str(resources.files("vlcache_dist") / "data" / BUNDLED))
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # the hub's errors derive from OSError; a malformed name is a ValueError
        raise CheckpointError(f"{name!r} is no folder, and the hub does not provide it: {error}") from error


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk: ``name`` as its file spells it, ``begin``/``end`` byte offsets in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """An opened and verified checkpoint: every tensor that the configuration asks for is there, in its shape and in a
    float dtype, and none besides. Holds headers only; weights are read by ``load_*``."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError naming the tensor that is missing, extra, doubled, misshapen or of another dtype, and
        UnsupportedModel as ``ModelConfig`` does."""
        self.folder = folder
        self.config = ModelConfig.load(folder)
        self.tensors = _index(folder)
        self._verify()

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """``name`` as in ``resolve``."""
        return cls(resolve(name, revision))

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that name the weights: BLAKE3 over both models' configurations and, per tensor in the order of
        canonical names, name, dtype, shape and a sample of its bytes (8 blocks of 4 KiB spread over the tensor; tensors
        up to 32 KiB whole).

        It does not depend on file names, sharding or naming style, and costs ~24 MB of reading for a 7B model. It tells
        trainings apart; it is no protection against somebody who alters unsampled weights on purpose.
        """
        parts = [asdict(self.config.text), asdict(self.config.vision)]
        digest = blake3(json.dumps(parts, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            size = tensor.end - tensor.begin
            with tensor.file.open("rb") as file:
                if size <= _SAMPLES * _SAMPLE_BYTES:
                    file.seek(tensor.begin)
                    digest.update(file.read(size))
                    continue
                for i in range(_SAMPLES):
                    file.seek(tensor.begin + i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def load_language_model(self, device: torch.device | str, dtype: torch.dtype) -> LanguageModel:
        """The language model on ``device``, weights converted to ``dtype``."""
        model = LanguageModel(self.config.text, self.config.tie_word_embeddings, device, dtype)
        self._fill(model.parameters())
        return model

    def load_vision_tower(self, device: torch.device | str, dtype: torch.dtype) -> VisionTower:
        """The vision tower on ``device``, weights converted to ``dtype``."""
        tower = VisionTower(self.config.vision, device, dtype)
        self._fill(tower.parameters())
        return tower

    def _verify(self) -> None:
        language = LanguageModel(self.config.text, self.config.tie_word_embeddings, "meta", torch.float32)
        tower = VisionTower(self.config.vision, "meta", torch.float32)
        expected = {n: tuple(t.shape) for n, t in (language.parameters() | tower.parameters()).items()}
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            hub = any(tensor.name != name for name, tensor in self.tensors.items())
            raise CheckpointError(f"{self.folder}: missing tensor {_named([_hub(n) if hub else n for n in missing])}")
        extra = [tensor.name for name, tensor in self.tensors.items() if name not in expected]
        if self.config.tie_word_embeddings and "lm_head.weight" in extra and self._duplicates_embedding():
            extra.remove("lm_head.weight")
        if extra:
            raise CheckpointError(f"{self.folder}: extra tensor {_named(extra)}")
        for name, shape in expected.items():
            found = self.tensors[name]
            if found.shape != shape:
                raise CheckpointError(f"{self.folder}: tensor {found.name} is {found.shape}, expected {shape}")
            if found.dtype not in _FLOATS:
                raise CheckpointError(f"{self.folder}: tensor {found.name} has dtype {found.dtype}, expected {_FLOATS}")

    def _duplicates_embedding(self) -> bool:
        """Some writers store tied weights twice; that is the same model as long as both are equal."""
        pair = [self.tensors[name] for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")]
        a, b = (next(_read([tensor], "cpu"))[1] for tensor in pair)
        return a.shape == b.shape and bool(torch.equal(a, b))

    def _fill(self, parameters: dict[str, torch.Tensor]) -> None:
        destination = {self.tensors[name].name: tensor for name, tensor in parameters.items()}
        device = str(next(iter(parameters.values())).device)
        with torch.inference_mode():
            for name, tensor in _read([self.tensors[name] for name in parameters], device):
                destination[name].copy_(tensor)


def _read(tensors: Iterable[StoredTensor], device: str) -> Iterator[tuple[str, torch.Tensor]]:
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for path, members in by_file.items():
        with safe_open(path, framework="pt", device=device) as file:
            for tensor in members:
                yield tensor.name, file.get_tensor(tensor.name)


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more: {', '.join(names[1:4])} ...)"


def _canonical(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def _hub(canonical: str) -> str:
    return canonical.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _index(folder: Path) -> dict[str, StoredTensor]:
    """Canonical name -> tensor, from the headers of the files that the index names, or of the single file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        weight_map, files = {}, [folder / "model.safetensors"]
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for tensor in _header(path):
            name = _canonical(tensor.name)
            if name in tensors:
                raise CheckpointError(f"{folder}: tensor {tensor.name} is stored twice")
            tensors[name] = tensor
    return tensors


def _header(path: Path) -> list[StoredTensor]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            size = file.seek(0, 2)
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise CheckpointError(f"{path}: truncated, tensor {name} ends at byte {end} of {size}")
        tensors.append(StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), begin, end))
    return tensors
