"""Content keys: everything that decides the numbers changes the key, and nothing collides by construction."""

import struct

import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from vlcache_dist import hashing
from vlcache_dist.hashing import MediaDigest, ModelIdentity, VideoSampling, canonical, content_key, frame

MODEL = ModelIdentity(repo="org/model", revision="abc", weights="f00d", dtype="bfloat16")
PROCESSOR = {"min_pixels": 3136, "patch_size": 14, "image_mean": [0.48, 0.46, 0.41], "do_resize": True}
BASE = {
    "salt": b"tenant",
    "media": hashing.media_digest(b"picture"),
    "modality": "image",
    "processor": PROCESSOR,
    "model": MODEL,
}
fields = st.lists(st.tuples(st.text(max_size=4), st.binary(max_size=6)), max_size=4)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def unframe(data):
    def take(count):
        nonlocal data
        assert len(data) >= count
        head, data = data[:count], data[count:]
        return head

    def number():
        return struct.unpack(">Q", take(8))[0]

    found = [(take(number()).decode(), take(number())) for _ in range(number())]
    assert not data
    return found


@given(fields)
@example([("a", b"bc"), ("d", b"")])
def test_frames_can_be_read_back_so_they_never_collide(some):
    assert unframe(frame(some)) == some


def decode(data):
    ((kind, value),) = unframe(data)
    if kind == "null":
        return None
    if kind == "bool":
        return value == b"1"
    if kind == "int":
        return int(value)
    if kind == "float":
        return struct.unpack(">d", value)[0]
    if kind == "str":
        return value.decode("utf-8", "surrogatepass")
    if kind == "list":
        return [decode(item) for _, item in unframe(value)]
    return {key: decode(item) for key, item in unframe(value)}


@given(json)
def test_canonical_values_can_be_read_back(value):
    assert repr(decode(canonical(value))) == repr(_sorted(value))


def _sorted(value):
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def test_canonical_ignores_order_and_respects_types():
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert canonical((1, 2)) == canonical([1, 2])
    assert len({canonical(value) for value in (1, 1.0, True, "1", [1], None, "", {}, [])}) == 9
    for value in ({1: 2}, b"raw", object(), {"a": {1}}):
        with pytest.raises(TypeError):
            canonical(value)


def test_key_is_stable_and_32_bytes():
    key = content_key(**BASE)
    assert len(key) == 32
    assert key == content_key(**BASE | {"processor": dict(reversed(PROCESSOR.items()))})
    # A changed encoding renames every stored object: change KV_FORM and this digest on purpose only.
    assert key.hex()[:16] == "8e5ec21dc7208cbe"


VIDEO = BASE | {"modality": "video", "sampling": VideoSampling(frames=(0, 2, 4), second_per_grid=1.0)}
CHANGES = [
    {"salt": b"tenant2"},
    {"salt": b""},
    {"media": hashing.media_digest(b"picture2")},
    {"processor": PROCESSOR | {"min_pixels": 3137}},
    {"processor": PROCESSOR | {"do_resize": 1}},
    {"processor": {}},
    {"model": ModelIdentity("org/model2", "abc", "f00d", "bfloat16")},
    {"model": ModelIdentity("org/model", "abd", "f00d", "bfloat16")},
    {"model": ModelIdentity("org/model", "abc", "f00e", "bfloat16")},
    {"model": ModelIdentity("org/model", "abc", "f00d", "float16")},
    {"model": ModelIdentity("org/modela", "bc", "f00d", "bfloat16")},  # the same bytes, framed elsewhere
]


def test_every_field_counts(monkeypatch):
    keys = [content_key(**BASE), content_key(**VIDEO)]
    keys += [content_key(**base | change) for change in CHANGES for base in (BASE, VIDEO)]
    keys += [
        content_key(**VIDEO | {"sampling": VideoSampling((0, 2), 1.0)}),
        content_key(**VIDEO | {"sampling": VideoSampling((0, 2, 5), 1.0)}),
        content_key(**VIDEO | {"sampling": VideoSampling((0, 2, 4), 0.5)}),
    ]
    monkeypatch.setattr(hashing, "KV_FORM", hashing.KV_FORM + 1)
    keys.append(content_key(**BASE))
    assert len(set(keys)) == len(keys)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="video without"):
        content_key(**BASE | {"modality": "video"})
    with pytest.raises(ValueError, match="image with"):
        content_key(**VIDEO | {"modality": "image"})
    with pytest.raises(ValueError, match="32"):
        content_key(**BASE | {"media": b"short"})


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_streaming_equals_one_shot(chunks):
    digest = MediaDigest()
    for chunk in chunks:
        digest.update(memoryview(chunk))
    data = b"".join(chunks)
    assert digest.digest() == hashing.media_digest(data) == blake3(data).digest()
    assert digest.num_bytes == len(data)


def test_frames_are_an_ordered_list():
    a, b = hashing.media_digest(b"a"), hashing.media_digest(b"b")
    digests = [[a], [b], [a, b], [b, a], [a, a, b], []]
    assert len({hashing.frames_digest(d) for d in digests} | {a, b, hashing.media_digest(a + b)}) == 9
    with pytest.raises(ValueError):
        hashing.frames_digest([a + b])


def test_tenants_have_their_own_salt():
    salts = [hashing.tenant_salt(t, s) for t, s in [("a", b""), ("b", b""), ("a", b"s"), ("", b"a"), ("sa", b"")]]
    assert len(set(salts)) == 5 and all(len(salt) == 32 for salt in salts)


def test_file_digest(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 4097)
    assert hashing.file_digest(path) == hashing.media_digest(path.read_bytes())
    with pytest.raises(OSError):
        hashing.file_digest(tmp_path / "missing")
