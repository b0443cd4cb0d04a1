"""Content keys: what a cached image is called.

A key covers everything that decides the numbers, and nothing else: tenant salt, the picture's own bytes, processor
configuration (for video also how frames were sampled), model, weights, dtype, and the form in which KV is stored.
A client's uuid, a URL or a file name is never part of it: those can be given to another picture.

Fields are tagged and length-framed, so that different inputs are always different bytes to the hash.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from blake3 import blake3

from vlcache_dist.types import ContentKey

KV_FORM = 1  #: what a KV object means (unrotated K, V as is, layer by layer); a change renames every object
DIGEST_BYTES = 32

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None


class ModelIdentity(msgspec.Struct, frozen=True):
    """Whose numbers these are. ``weights`` is the fingerprint of the tensors, ``dtype`` that of storage."""

    repo: str
    revision: str
    weights: str
    dtype: str


class VideoSampling(msgspec.Struct, frozen=True):
    """``frames``: indices into the source video that were taken, in order. ``second_per_grid``: seconds between
    two temporal patches, which M-RoPE positions depend on."""

    frames: tuple[int, ...]
    second_per_grid: float


class MediaDigest:
    """Streaming digest of raw bytes: ``update`` as they arrive, ``digest`` (32 bytes) at the end.

    A video given as a list of pictures is digested with ``frames_digest`` over the pictures' digests.
    """

    def __init__(self) -> None:
        self._hasher = blake3()
        self.num_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hasher.update(data)
        self.num_bytes += memoryview(data).nbytes

    def digest(self) -> bytes:
        return self._hasher.digest()


def media_digest(data: bytes | bytearray | memoryview) -> bytes:
    """32-byte digest of one file's bytes."""
    return blake3(data).digest()


def frames_digest(digests: Sequence[bytes]) -> bytes:
    """32-byte digest of an ordered list of pictures, given theirs; never equal to that of any single file."""
    return blake3(frame([("frames", b"".join(_digest(d) for d in digests))])).digest()


def file_digest(path: Path) -> bytes:
    """32-byte digest of a file, memory-mapped and hashed on all cores (weights run to gigabytes). Raises OSError."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def tenant_salt(tenant: str, secret: bytes) -> bytes:
    """32 bytes that separate tenants' keys. Without the operator's ``secret`` nobody can tell from a key whether a
    given picture is meant; an empty secret still separates tenants."""
    return blake3(frame([("salt.secret", secret), ("salt.tenant", tenant.encode())])).digest()


def content_key(
    *,
    salt: bytes,
    media: bytes,
    modality: Literal["image", "video"],
    processor: Mapping[str, Json],
    model: ModelIdentity,
    sampling: VideoSampling | None = None,
) -> ContentKey:
    """The 32-byte name of an image's or video's cached objects.

    ``media`` is the digest of the raw bytes; ``processor`` all settings of the image processor that change patches
    (sizes, means, resampling, patch and merge sizes), as JSON values. Raises ValueError for a digest of another
    size, a video without sampling or an image with it, and TypeError for a value that is not JSON.
    """
    if (modality == "video") != (sampling is not None):
        raise ValueError(f"{modality} {'without' if sampling is None else 'with'} frame sampling")
    fields = [
        ("tenant", salt),
        ("media", _digest(media)),
        ("modality", modality.encode()),
        ("processor", canonical(processor)),
        ("model.repo", model.repo.encode()),
        ("model.revision", model.revision.encode()),
        ("model.weights", model.weights.encode()),
        ("model.dtype", model.dtype.encode()),
        ("kv_form", str(KV_FORM).encode()),
    ]
    if sampling is not None:
        fields += [
            ("video.frames", canonical(sampling.frames)),
            ("video.second_per_grid", canonical(float(sampling.second_per_grid))),
        ]
    return blake3(frame(fields)).digest()


def frame(fields: Sequence[tuple[str, bytes]]) -> bytes:
    """An injective encoding of tagged fields: count, then per field length and bytes of tag and of value."""
    parts = [struct.pack(">Q", len(fields))]
    for tag, value in fields:
        name = tag.encode()
        parts += [struct.pack(">Q", len(name)), name, struct.pack(">Q", len(value)), value]
    return b"".join(parts)


def canonical(value: Json) -> bytes:
    """An injective encoding of a JSON value: the order of a mapping's keys does not matter, and types do (1, 1.0,
    True and "1" all differ). Raises TypeError for anything else, among it keys that are not strings."""
    if value is None:
        return frame([("null", b"")])
    if isinstance(value, bool):
        return frame([("bool", b"1" if value else b"0")])
    if isinstance(value, int):
        return frame([("int", str(value).encode())])
    if isinstance(value, float):
        return frame([("float", struct.pack(">d", value))])
    if isinstance(value, str):
        return frame([("str", value.encode("utf-8", "surrogatepass"))])
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a mapping in a content key has keys that are not strings")
        return frame([("map", frame([(key, canonical(value[key])) for key in sorted(value)]))])
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return frame([("list", frame([("", canonical(item)) for item in value]))])
    raise TypeError(f"{type(value).__name__} in a content key is not a JSON value")


def _digest(value: bytes) -> bytes:
    if len(value) != DIGEST_BYTES:
        raise ValueError(f"a digest of {len(value)} bytes; it must have {DIGEST_BYTES}")
    return value
