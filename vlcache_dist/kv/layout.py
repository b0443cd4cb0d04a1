"""The shape of KV and encoder output in memory: the one thing two workers must agree on before bytes move.

Paged KV    ``[layer, 2, block, block_size, kv_head, head_dim]``  K rotated to its M-RoPE position, V as is
KV extent   ``[layer, 2, token, kv_head, head_dim]``              K unrotated: valid at any position
Embedding   ``[token, hidden]``                                   the vision encoder's output
Staging     ``[layer, 2, row, kv_head, head_dim]``                pages packed for the prefill-to-decode handoff

Offsets inside an arena are counted in *elements* of ``dtype``, so that they stay small enough to index with and the
same on every peer.
"""

from __future__ import annotations

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVLayout(msgspec.Struct, frozen=True):
    """``dtype`` is the storage dtype of KV and embeddings; ``model`` the weights' fingerprint; ``tp_rank`` and
    ``tp_size`` say which shard of the KV heads this is (``num_kv_heads`` counts the shard's own)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    dtype: str
    model: str
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_row(self) -> int:
        """Elements of K (or of V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_token(self) -> int:
        """Elements of K and V of one token over all layers (7B: 28,672 elements, 57,344 B in bf16)."""
        return 2 * self.num_layers * self.kv_row

    def kv_elements(self, num_tokens: int) -> int:
        return num_tokens * self.kv_token

    def embedding_elements(self, num_tokens: int) -> int:
        return num_tokens * self.hidden

    def layer_range(self, num_tokens: int, start: int, stop: int) -> tuple[int, int]:
        """(offset, length) in elements of layers [start, stop) inside a KV extent of ``num_tokens``."""
        layer = 2 * num_tokens * self.kv_row
        return start * layer, (stop - start) * layer

    def without_kv(self) -> KVLayout:
        """Of a worker that keeps encoder output only, which is the same in every shard."""
        return msgspec.structs.replace(self, num_layers=0)

    def difference(self, other: KVLayout) -> str:
        """Empty if the peer's extents can be read as ours; otherwise a sentence that names what differs. With a peer
        that keeps no KV, only what encoder output depends on is compared."""
        names = self.__struct_fields__ if self.num_layers and other.num_layers else ("hidden", "dtype", "model")
        parts = [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} there"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(parts)
