"""What the model calls on tensors. Each function has a torch reference (``*_reference`` in its module, which holds the
contract: shapes, dtypes, rounding) and a Triton kernel in ``kernels.gpu``; the tensor's device picks. Attention has
further implementations behind the seam in ``kernels.backends``.

On CUDA nothing here synchronizes with the host, so every call can be captured in a CUDA graph. Grids come from
shapes and from the host integers ``max_q`` and ``max_kv``. Inputs may be row-strided views (the last two dimensions
contiguous), so the parts of a fused QKV projection need no copy.
"""

from __future__ import annotations

from vlcache_dist.kernels.backends import compile_attention, segment_attention, varlen_attention
from vlcache_dist.kernels.dispatch import enable_triton, uses_triton
from vlcache_dist.kernels.ops import (
    add_rms_norm,
    compile_swiglu,
    gather_extent,
    linear,
    pack_rows,
    rms_norm,
    rotate,
    rotate_and_write,
    rotate_scatter,
    silu_mul,
    swiglu,
    unpack_rows,
    word_sums,
    write_kv,
)

__all__ = [
    "add_rms_norm",
    "compile_attention",
    "compile_swiglu",
    "enable_triton",
    "gather_extent",
    "linear",
    "pack_rows",
    "rms_norm",
    "rotate",
    "rotate_and_write",
    "rotate_scatter",
    "segment_attention",
    "silu_mul",
    "swiglu",
    "unpack_rows",
    "uses_triton",
    "varlen_attention",
    "word_sums",
    "write_kv",
]
