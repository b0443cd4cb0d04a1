"""The vision tower: patches to vision tokens, all images of a batch packed into one sequence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlcache_dist import kernels
from vlcache_dist.model.config import VisionConfig
from vlcache_dist.model.graph_policy import GraphReport
from vlcache_dist.model.upload import upload
from vlcache_dist.model.vision_graphs import GraphedTower
from vlcache_dist.model.vision_layout import Grid, vision_layout

#: Frames, and merged tokens along a side: products and attention are chosen by size and number of sequences.
WARM_UP = ((1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (66, 5))
_EPS = 1e-6  # transformers fixes it, whatever the configuration says
_WIDTH_MULTIPLE = 64  # of the MLP: rows of 3,420 bf16 are not whole 16 bytes, and matrix products lose half their rate


@dataclass(slots=True)
class VisionBlock:
    """C hidden, I intermediate (padded with zeros: they change nothing). ``qkv`` is [3C, C] with Q, K, V in this order;
    ``gate_up`` is [2I, C]."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    proj: torch.Tensor
    proj_bias: torch.Tensor
    norm2: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor


class VisionTower:
    """Weights are uninitialized until ``model.weights`` fills them through ``parameters``. ``forward`` may be called
    from one thread at a time, always on the same stream: small batches are replayed from CUDA graphs."""

    def __init__(self, config: VisionConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        def new(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        c, joined = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
        i = -(-config.intermediate_size // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.patch_embed = new(c, config.patch_elements)
        self.blocks = [
            VisionBlock(
                norm1=new(c),
                qkv=new(3 * c, c),
                qkv_bias=new(3 * c),
                proj=new(c, c),
                proj_bias=new(c),
                norm2=new(c),
                gate_up=torch.zeros(2 * i, c, device=device, dtype=dtype),
                gate_up_bias=torch.zeros(2 * i, device=device, dtype=dtype),
                down=torch.zeros(c, i, device=device, dtype=dtype),
                down_bias=new(c),
            )
            for _ in range(config.depth)
        ]
        self.merger_norm = new(c)
        self.merger_in, self.merger_in_bias = new(joined, joined), new(joined)
        self.merger_out, self.merger_out_bias = new(config.out_hidden_size, joined), new(config.out_hidden_size)
        quarter = config.head_dim // 2
        frequency = 1.0 / (config.rope_theta ** (torch.arange(0, quarter, 2, dtype=torch.float) / quarter))
        self.frequency = frequency.to(device)  # fp32 [D/4]
        self._graphs = None
        if kernels.uses_triton(self.patch_embed):
            merged = config.spatial_merge_size**2
            self._graphs = GraphedTower(self._encode, config.patch_elements, merged, self.device, dtype)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name -> the (view of a) tensor that it fills, in the checkpoint's shape."""
        config, prefix, wide = self.config, "model.visual.", self.config.intermediate_size
        kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        named = {
            "patch_embed.proj.weight": self.patch_embed.view(config.hidden_size, *kernel),
            "merger.ln_q.weight": self.merger_norm,
            "merger.mlp.0.weight": self.merger_in,
            "merger.mlp.0.bias": self.merger_in_bias,
            "merger.mlp.2.weight": self.merger_out,
            "merger.mlp.2.bias": self.merger_out_bias,
        }
        for n, block in enumerate(self.blocks):
            gate, up = (part[:wide] for part in block.gate_up.chunk(2))
            gate_bias, up_bias = (part[:wide] for part in block.gate_up_bias.chunk(2))
            named |= {
                f"blocks.{n}.norm1.weight": block.norm1,
                f"blocks.{n}.norm2.weight": block.norm2,
                f"blocks.{n}.attn.qkv.weight": block.qkv,
                f"blocks.{n}.attn.qkv.bias": block.qkv_bias,
                f"blocks.{n}.attn.proj.weight": block.proj,
                f"blocks.{n}.attn.proj.bias": block.proj_bias,
                f"blocks.{n}.mlp.gate_proj.weight": gate,
                f"blocks.{n}.mlp.gate_proj.bias": gate_bias,
                f"blocks.{n}.mlp.up_proj.weight": up,
                f"blocks.{n}.mlp.up_proj.bias": up_bias,
                f"blocks.{n}.mlp.down_proj.weight": block.down[:, :wide],
                f"blocks.{n}.mlp.down_proj.bias": block.down_bias,
            }
        return {prefix + name: tensor for name, tensor in named.items()}

    @torch.inference_mode()
    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """patches [N, C*T*P*P] as the image processor delivers them, images one after the other in any float dtype;
        grids (t, h, w) in patches with N = sum of t*h*w -> [N / merge**2, out_hidden_size], same order, tower dtype.

        Raises ValueError if patches and grids disagree, or for sides that the merge does not divide.
        """
        config = self.config
        if not grids:
            return torch.empty(0, config.out_hidden_size, device=self.device, dtype=self.dtype)
        layout = vision_layout(grids, config)
        expected = (layout.row_column.shape[1], config.patch_elements)
        if tuple(patches.shape) != expected:
            raise ValueError(f"patches {tuple(patches.shape)}: the grids say {expected}")
        x = patches.to(self.device, non_blocking=True).to(self.dtype)  # converted there: the host would take longer
        if self._graphs is not None and (rows := self._graphs.run(x, layout)) is not None:
            (inverse,) = upload((layout.inverse,), self.device)
            return rows[inverse]
        order, inverse, row_column, windows, frames = upload(
            (layout.order, layout.inverse, layout.row_column, layout.windows, layout.frames), self.device
        )
        rows = self._encode(x, order, row_column, windows, frames, layout.longest_window, layout.longest_frame)
        return rows[inverse]

    def warm_up(self, graph_s: float) -> None:
        """Compile and load every kernel, and capture graphs for ``graph_s`` seconds, before somebody waits."""
        if not kernels.uses_triton(self.patch_embed):
            return
        kernels.compile_swiglu(self.blocks[0].gate_up, self.blocks[0].gate_up_bias)
        merge = self.config.spatial_merge_size
        for frames, side in WARM_UP:
            grid = (frames, side * merge, side * merge)
            rows = grid[0] * grid[1] * grid[2]
            self.forward(torch.zeros(rows, self.config.patch_elements, device=self.device, dtype=self.dtype), [grid])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        compiled = time.monotonic()
        while time.monotonic() < compiled + graph_s and self.prepare():
            pass

    def prepare(self) -> bool:
        """Do a piece of what will make coming batches faster; False if there is nothing left. Same thread."""
        return self._graphs is not None and self._graphs.capture_next()

    def graph_report(self) -> GraphReport | None:
        """What became of the graphs; None if there are none to be. Any thread."""
        return None if self._graphs is None else self._graphs.report()

    @torch.inference_mode()
    def _encode(
        self,
        patches: torch.Tensor,
        order: torch.Tensor,
        row_column: torch.Tensor,
        windows: torch.Tensor,
        frames: torch.Tensor,
        longest_window: int,
        longest_frame: int,
    ) -> torch.Tensor:
        """patches [N, patch_elements] of the tower's dtype and device -> [M, out_hidden_size] in permuted order."""
        x = F.linear(patches, self.patch_embed)
        x = x.view(len(order), -1)[order].view(len(x), -1)
        cos, sin = self._rotary(row_column)
        pending: torch.Tensor | None = None  # the previous block's MLP output, not yet added to x
        for n, block in enumerate(self.blocks):
            if n in self.config.full_attention_blocks:
                x, pending = self._block(x, pending, block, cos, sin, frames, longest_frame)
            else:
                x, pending = self._block(x, pending, block, cos, sin, windows, longest_window)
        x, _ = self._add_norm(x, pending, self.merger_norm)
        x = x.view(len(order), -1)
        return F.linear(F.gelu(F.linear(x, self.merger_in, self.merger_in_bias)), self.merger_out, self.merger_out_bias)

    def _rotary(self, row_column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [2, N] -> cos, sin fp32 [N, D/2]: the first half of the frequencies turns with the row, the second
        with the column."""
        angle = torch.cat([axis.float()[:, None] * self.frequency for axis in row_column], -1)
        return angle.cos(), angle.sin()

    def _add_norm(
        self, x: torch.Tensor, pending: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + pending, x + pending)."""
        if pending is None:
            return kernels.rms_norm(x, weight, _EPS), x
        return kernels.add_rms_norm(pending, x, weight, _EPS)

    def _block(
        self,
        x: torch.Tensor,
        pending: torch.Tensor | None,
        block: VisionBlock,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu: torch.Tensor,
        longest: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + pending through the block: residual [N, C], and the MLP's output that is still to be added to it."""
        h, x = self._add_norm(x, pending, block.norm1)
        heads = self.config.num_heads
        qkv = F.linear(h, block.qkv, block.qkv_bias).view(len(x), 3 * heads, -1)
        q, k = kernels.rotate(qkv[:, : 2 * heads], cos, sin).split(heads, 1)
        v = qkv[:, 2 * heads :]
        attended = kernels.varlen_attention(q, k, v, cu, longest)
        h = F.linear(attended.reshape(len(x), -1), block.proj, block.proj_bias)
        h, x = kernels.add_rms_norm(h, x, block.norm2, _EPS)
        return x, F.linear(kernels.swiglu(h, block.gate_up, block.gate_up_bias), block.down, block.down_bias)
