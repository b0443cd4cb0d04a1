"""What the model calls on tensors. Each function has a torch reference (``*_reference`` in its module, which holds the
contract: shapes, dtypes, rounding) and a Triton kernel in ``kernels.gpu``; the tensor's device picks.

On CUDA nothing here synchronizes with the host, so every call can be captured in a CUDA graph. Grids come from
shapes and from the host integers ``max_q`` and ``max_kv``. Inputs may be row-strided views (the last two dimensions
contiguous), so the parts of a fused QKV projection need no copy.
"""

from __future__ import annotations

from vlcache_dist.kernels.activation import silu_mul_reference as silu_mul
from vlcache_dist.kernels.attention import segment_attention_reference as segment_attention
from vlcache_dist.kernels.attention import varlen_attention_reference as varlen_attention
from vlcache_dist.kernels.dispatch import enable_triton, uses_triton
from vlcache_dist.kernels.kv_write import rotate_and_write_reference as rotate_and_write
from vlcache_dist.kernels.kv_write import write_kv_reference as write_kv
from vlcache_dist.kernels.norm import add_rms_norm_reference as add_rms_norm
from vlcache_dist.kernels.norm import rms_norm_reference as rms_norm
from vlcache_dist.kernels.pack import pack_rows_reference as pack_rows
from vlcache_dist.kernels.pack import unpack_rows_reference as unpack_rows
from vlcache_dist.kernels.rope import rotate_reference as rotate
from vlcache_dist.kernels.rotate_scatter import gather_extent_reference as gather_extent
from vlcache_dist.kernels.rotate_scatter import rotate_scatter_reference as rotate_scatter

__all__ = [
    "add_rms_norm",
    "enable_triton",
    "gather_extent",
    "pack_rows",
    "rms_norm",
    "rotate",
    "rotate_and_write",
    "rotate_scatter",
    "segment_attention",
    "silu_mul",
    "unpack_rows",
    "uses_triton",
    "varlen_attention",
    "write_kv",
]
