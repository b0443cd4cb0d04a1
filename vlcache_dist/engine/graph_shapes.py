"""The shapes for which a step's CUDA graphs are captured, and which of them are captured before anybody asks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlcache_dist.engine.batch import StepBatch

ROWS = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, 1025, 32), *range(1152, 2049, 128))
SAMPLES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  #: multiples of few, to be captured ahead
LEAST_KEYS = 2048  #: and more than any padding
LEAST_NEAR_KEYS = 256
LEAST_SCATTER = 256
FAR_STEP = 16  #: sampled and far rows together are padded to a multiple of it
#: Rows that see far and near of the prefill steps to be captured ahead (sampled ones apart): short prompts, and
#: warm requests with what is recomputed of their images.
PREFILL_ROWS = (
    *((63, 64), (63, 192), (127, 128), (63, 448), (255, 256), (255, 768)),
    *((127, 0), (255, 0), (511, 0), (1023, 0)),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for: ``rows``, the first ``samples`` of which are sampled, ``far`` more that see many
    keys, and the rest, near ones (see ``model.batch``); the segments of far and near rows, sampled ones apart, with
    bounds of queries and keys; reused tokens that are scattered first; whether rows are recorded."""

    rows: int
    samples: int
    far: int
    far_segments: int
    far_max_q: int
    max_kv: int
    near_segments: int
    near_max_q: int
    near_max_kv: int
    scatter: int
    recording: bool

    @property
    def segments(self) -> int:
        return self.samples + self.far_segments + self.near_segments

    @property
    def near(self) -> int:
        return self.rows - self.samples - self.far


def shape_for(step: StepBatch) -> Shape | None:
    """The least shape that holds a step; None if it must be launched kernel by kernel."""
    rows, samples = len(step.token_ids), step.num_samples
    if not samples or rows > ROWS[-1] or step.rows_q[-1] != samples:
        return None
    if step.rows_kv[-1] != rows:  # fewer from layer to layer
        return None
    padded_samples = _at_least(samples, SAMPLES)
    if padded_samples is None:
        return None
    far, near = step.far_rows - samples, rows - step.far_rows
    if near:
        far = -(-(padded_samples + far) // FAR_STEP) * FAR_STEP - padded_samples
    padded_rows = _at_least(padded_samples + far + near, ROWS) if far + near else padded_samples
    if padded_rows is None:
        return None
    if not near:
        far = padded_rows - padded_samples
    near_padded = padded_rows - padded_samples - far
    lengths = np.diff(step.cu_q)
    scatter = len(step.scatter_src)
    return Shape(
        rows=padded_rows,
        samples=padded_samples,
        far=far,
        far_segments=_power_of_two(step.far_segs - samples + 1) if far else 0,
        far_max_q=_power_of_two(max(lengths[samples : step.far_segs].max(initial=1), far - step.far_rows + samples)),
        max_kv=max(LEAST_KEYS, _power_of_two(step.max_kv)),
        near_segments=_power_of_two(len(lengths) - step.far_segs + 1) if near else 0,
        near_max_q=_power_of_two(max(lengths[step.far_segs :].max(initial=0), near_padded - near)) if near else 0,
        near_max_kv=max(LEAST_NEAR_KEYS, _power_of_two(step.kv_len[step.far_segs :].max())) if near else 0,
        scatter=max(LEAST_SCATTER, _power_of_two(scatter)) if scatter else 0,
        recording=bool((step.record_base >= 0).any()),
    )


def decode_shapes(max_batch: int, max_keys: int) -> list[Shape]:
    """The shapes of decode steps of up to ``max_batch`` sequences of up to ``max_keys`` tokens."""
    bounds = [LEAST_KEYS << i for i in range(_power_of_two(-(-max_keys // LEAST_KEYS)).bit_length())]
    last = _at_least(min(max_batch, SAMPLES[-1]), SAMPLES)
    return [
        Shape(rows, rows, 0, 0, 1, keys, 0, 0, 0, scatter=0, recording=False)
        for keys in bounds
        for rows in SAMPLES
        if last is not None and rows <= last
    ]


def prefill_shapes(max_rows: int, max_batch: int, max_keys: int) -> list[Shape]:
    """Few shapes that hold most prefill steps of up to ``max_rows`` rows of ``max_batch`` sequences of up to
    ``max_keys`` tokens, warm and cold: one request first, then prompts beside ``max_batch`` decoding sequences."""
    keys = max(LEAST_KEYS, _power_of_two(max_keys))
    crowd = _at_least(min(max_batch, SAMPLES[-1]), SAMPLES) or SAMPLES[-1]
    return [
        Shape(
            rows=samples + far + near,
            samples=samples,
            far=far,
            far_segments=8 if samples == 1 else 32,
            far_max_q=_power_of_two(far),
            max_kv=bound,
            near_segments=32 if near else 0,
            near_max_q=_power_of_two(near),
            near_max_kv=max(LEAST_NEAR_KEYS, bound // 4) if near else 0,
            scatter=bound if near else 2 * LEAST_KEYS,
            recording=True,
        )
        for samples in dict.fromkeys((1, crowd))
        for bound in dict.fromkeys(min(keys, most) for most in (2 * LEAST_KEYS, 16 * LEAST_KEYS))
        for far, near in PREFILL_ROWS
        if 1 + far + near <= max_rows
    ]


def eager_shapes(max_rows: int) -> list[Shape]:
    """Shapes that together use every kernel of a step of up to ``max_rows`` rows: far rows alone and with near ones,
    recording and not, of sizes for which matrix products and attention choose differently."""
    alone = [rows for rows in (1, 2, *(8 << i for i in range(9))) if rows <= max_rows]
    shapes = [
        Shape(n, 1, n - 1, int(n > 1), _power_of_two(n - 1) if n > 1 else 1, LEAST_KEYS, 0, 0, 0, 0, bool(n > 1))
        for n in dict.fromkeys((*alone, max_rows))
    ]
    both = Shape(64, 1, 15, 2, 16, 16 * LEAST_KEYS, 4, 64, LEAST_NEAR_KEYS, LEAST_SCATTER, recording=False)
    return [*shapes, both, replace(both, recording=True)]


def holds(graph: Shape, step: Shape) -> bool:
    """True if a step of least shape ``step`` can be padded to ``graph``, however few of its rows are real: what is left
    over of far rows is one segment, and so is what is left over of near ones."""
    return (
        graph.samples >= step.samples
        and graph.far >= step.far
        and graph.far_segments >= step.far_segments
        and (not graph.far or graph.far_max_q >= max(step.far_max_q, graph.far))
        and graph.max_kv >= step.max_kv
        and graph.near >= step.near
        and graph.near_segments >= step.near_segments
        and (not graph.near or graph.near_max_q >= max(step.near_max_q, graph.near))
        and graph.near_max_kv >= step.near_max_kv
        and graph.scatter >= step.scatter
        and graph.recording >= step.recording
    )


def launched_rows(layer_weights: int) -> int:
    """As many rows of a layer of so many weights as are computed while one is launched kernel by kernel. Measured on an
    H200: 0.85 ms a layer, and products at 600 TFLOP/s."""
    return round(0.85e-3 * 600e12 / (2 * layer_weights))


def worthwhile(graph: Shape, step: Shape, launched: int) -> bool:
    """True if computing ``graph``'s rows from a graph is faster than launching ``step``'s kernel by kernel, which takes
    as long as ``launched`` rows."""
    return graph.far + graph.near <= max(launched, 3 * step.rows // 2)


def cost(graph: Shape) -> tuple[int, ...]:
    """Order of graphs that hold the same step, the fastest first: below some 64 rows, reading the weights is all."""
    return (max(graph.rows, 64), graph.near_max_kv, graph.max_kv, graph.segments, graph.scatter, graph.samples)


def _at_least(count: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if size >= count), None)


def _power_of_two(count: int | np.integer) -> int:
    return 1 << max(int(count) - 1, 0).bit_length()
