"""Reading a trained grid and the gradients of the reading, each in one Triton launch (`calibrate.latent`).

In torch a read is some twenty small launches forward and as many backward, for each layer, depth and step: on SmolLM2 that was
half the time of a training step. A program takes some rows of one group, so sums over a group stay inside it and are the same
every time.
"""

# Triton comes with CUDA builds of torch only, and kernels are a language of their own
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiquant.slices import MAX_SCALE, MIN_SCALE, ZERO_BITS

ROWS = 16


@triton.jit
@no_type_check
def _rounded(x):
    """Nearest whole number, ties to even, of |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
@no_type_check
def _place(
    position, log_scale, zero, cells_at, N, K, G, size, base_steps, steps, least, most, R: tl.constexpr, P: tl.constexpr
):
    """Where the program works, and what it needs there: positions in cells, scale as stored, shift, and unrounded scale."""
    row, group = tl.program_id(0) * R + tl.arange(0, R)[:, None], tl.program_id(1)
    lane = tl.arange(0, P)[None, :]
    column = group * size + lane
    inside = (row < N) & (lane < size) & (column < K)
    cells = tl.load(cells_at)
    last = cells * base_steps - 1e-3
    at = row.to(tl.int64) * K + column
    raw = tl.exp(tl.load(log_scale + row * G + group, mask=row < N, other=0.0))
    scale = tl.minimum(tl.maximum(raw, least), most).to(tl.float16).to(tl.float32)
    stored = tl.minimum(tl.maximum(_rounded(tl.load(zero + row * G + group, mask=row < N, other=0.0) * steps), 0.0), 255.0)
    shift = stored / steps + 0.5
    cell = tl.load(position + at, mask=inside, other=0.0) * cells
    level = (tl.floor(tl.minimum(tl.maximum(cell, 0.0), last)) + 0.5) / cells
    return row, group, at, inside, cell, last, level, scale, shift, raw


@triton.jit
@no_type_check
def _read(
    position, log_scale, zero, cells_at, out, N, K, G, size, base_steps, steps, least, most, R: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    _, _, at, inside, _, _, level, scale, shift, _ = _place(
        position, log_scale, zero, cells_at, N, K, G, size, base_steps, steps, least, most, R, P
    )
    tl.store(out + at, (scale * (level - shift)).to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _back(
    position, log_scale, zero, cells_at, slope, d_position, d_log, d_zero, N, K, G, size, base_steps, steps, least, most,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row, group, at, inside, cell, last, level, scale, shift, raw = _place(
        position, log_scale, zero, cells_at, N, K, G, size, base_steps, steps, least, most, R, P
    )
    g = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_position + at, tl.where((cell >= 0.0) & (cell <= last), scale * g, 0.0), mask=inside)
    d_scale = tl.sum(g * (level - shift), axis=1)[:, None] * raw
    tl.store(d_log + row * G + group, d_scale, mask=row < N)
    d_shift = -tl.sum(g, axis=1)[:, None] * scale
    tl.store(d_zero + row * G + group, d_shift, mask=row < N)


def _launch(kernel: Any, tensors: Sequence[Tensor], group_size: int, base: int) -> None:
    """Run a kernel over the groups of the first two tensors, position and log scale."""
    (rows, columns), groups = tensors[0].shape, tensors[1].shape[1]
    numbers = rows, columns, groups, group_size, 2.0**base, 2.0 ** (ZERO_BITS - base), MIN_SCALE, MAX_SCALE
    kernel[(triton.cdiv(rows, ROWS), groups)](*tensors, *numbers, R=ROWS, P=triton.next_power_of_2(group_size))


def read(
    position: Tensor, log_scale: Tensor, zero: Tensor, cells: Tensor, group_size: int, base: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Weights [N, K] of `dtype` from position [N, K], log scale and zero point [N, G], all fp32 and contiguous.

    `cells`, fp32 with one element, are those in a base step at the depth, `base` is the width of the first slice.
    """
    out = torch.empty(position.shape, dtype=dtype, device=position.device)
    _launch(_read, (position, log_scale, zero, cells, out), group_size, base)
    return out


def back(
    slope: Tensor, position: Tensor, log_scale: Tensor, zero: Tensor, cells: Tensor, group_size: int, base: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of position, log scale and zero point, for that of the weights [N, K] of any float dtype.

    Rounding passes gradients straight through; a position outside the grid gets none.
    """
    made = torch.empty_like(position), torch.empty_like(log_scale), torch.empty_like(zero)
    _launch(_back, (position, log_scale, zero, cells, slope.contiguous(), *made), group_size, base)
    return made
