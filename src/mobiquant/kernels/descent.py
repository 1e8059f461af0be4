"""One block of columns of `compensate.descend` in one Triton launch.

Rows are independent of each other: a program takes a few rows and goes through the columns of the block, keeping their
gradients of all depths in registers. In torch the same work is some twenty launches a column, which bind a GPU.
"""

# Triton comes with CUDA builds of torch only, and kernels are a language of their own
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiquant.kernels import DESCENT_COLUMNS

ROWS = 16


@triton.jit
@no_type_check
def _choose(
    target, weight, cell, width, tails,
    WIDTHS: tl.constexpr, BASE: tl.constexpr, COARSE: tl.constexpr, SEARCH: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    e, real,
):  # fmt: skip
    """`compensate.Chooser` for R rows of one column: target [EP, R] -> codes [1, R]."""
    fine = tl.sum(tl.where(e >= COARSE, weight, 0.0))
    mean = tl.zeros([1, R], tl.float32)
    if COARSE < E:
        mean = tl.sum(tl.load(tails + e, mask=real, other=0.0) * target, axis=0)[None, :]
    best = tl.full([1, R], float("inf"), tl.float32)
    code = tl.zeros([1, R], tl.int32)
    for c in range(2**SEARCH):
        centre = ((c >> tl.maximum(SEARCH - width, 0)).to(tl.float32) + 0.5) * cell
        gap = tl.where(e < COARSE, centre - target, 0.0)
        cost = tl.sum(weight * gap * gap, axis=0)[None, :]
        if COARSE < E:
            low = (c + 0.5 ** (WIDTHS[COARSE] - SEARCH + 1)) * 2.0 ** (BASE - SEARCH)
            high = low + 2.0**BASE * (0.5**SEARCH - 0.5 ** WIDTHS[COARSE])
            outside = tl.minimum(tl.maximum(mean, low), high) - mean
            cost += fine * outside * outside
        code = tl.where(cost < best, c, code)
        best = tl.minimum(best, cost)
    for d in tl.static_range(COARSE, E):
        tail = tl.load(tails + (d - COARSE) * E + e, mask=real, other=0.0)
        middle = tl.sum(tail * target, axis=0)[None, :]
        first = code << (WIDTHS[d] - WIDTHS[d - 1])
        # bounded before the cast, which is undefined beyond int32
        near = tl.minimum(tl.maximum(tl.floor(middle * 2.0 ** (WIDTHS[d] - BASE)), -1.0), 256.0).to(tl.int32)
        code = tl.minimum(tl.maximum(near, first), first + 2 ** (WIDTHS[d] - WIDTHS[d - 1]) - 1)
    return code


@triton.jit
@no_type_check
def _block(
    gradient, hessian, chosen, scale, diagonal, weights, tails, moved,
    K, N, start, count,
    WIDTHS: tl.constexpr, BASE: tl.constexpr, COARSE: tl.constexpr, SEARCH: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = WIDTHS[E - 1]
    e = tl.arange(0, EP)[:, None]  # [EP, 1]
    row = tl.program_id(0) * R + tl.arange(0, R)[None, :]  # [1, R]
    k = tl.arange(0, B)[None, :, None]  # [1, B, 1]
    depth, real, inside = e[:, :, None], e < E, row < N
    width = tl.full([EP, 1], TOTAL, tl.int32)
    for d in tl.static_range(E):
        width = tl.where(e == d, WIDTHS[d], width)
    cell = tl.exp2((BASE - width).to(tl.float32))
    place = (depth * count + k).to(tl.int64) * N + row[:, None, :]
    g = tl.load(gradient + place, mask=(depth < E) & (k < count) & inside[:, None, :], other=0.0)  # [EP, B, R]
    # a bound known when compiling, since the interpreter on a CPU takes no other
    for i in range(0, B):
        column = tl.minimum(start + i, K - 1)
        reached = inside & (i < count)
        slope = tl.sum(tl.where(k == i, g, 0.0), axis=1)  # [EP, R]
        diag = tl.load(diagonal + column * E + e, mask=real, other=1.0)
        weight = tl.load(weights + column * E + e, mask=real, other=0.0)
        s = tl.load(scale + column * N + row, mask=inside, other=1.0)
        old = tl.load(chosen + column * N + row, mask=inside, other=0).to(tl.int32)
        level = ((old >> (TOTAL - width)).to(tl.float32) + 0.5) * cell
        target = level - slope / (diag * s)
        mine = tails + column * (E - COARSE) * E
        code = _choose(target, weight, cell, width, mine, WIDTHS, BASE, COARSE, SEARCH, E, R, e, real)
        tl.store(chosen + column * N + row, code.to(tl.uint8), mask=reached)
        delta = (((code >> (TOTAL - width)).to(tl.float32) + 0.5) * cell - level) * s  # [EP, R]
        tl.store(moved + (e * count + i).to(tl.int64) * N + row, delta, mask=real & reached)
        h = tl.load(hessian + (depth.to(tl.int64) * K + column) * K + start + k, mask=(depth < E) & (k < count), other=0.0)
        g += h * delta[:, None, :]


def block(
    gradient: Tensor, hessian: Tensor, chosen: Tensor, scale: Tensor, diagonal: Tensor, weights: Tensor, tails: Tensor,
    widths: Sequence[int], base: int, search_bits: int, start: int, stop: int,
) -> Tensor:  # fmt: skip
    """Choose the codes of the columns `start` to `stop`, B of them, anew, in place in `chosen` uint8 [K, N].

    Shapes: gradient [E, B, N], hessian [E, K, K], scale [K, N], diagonal and weights [K, E], tails [K, E - coarse, E], all
    contiguous fp32 on one CUDA device. Returns by how much the weights moved, [E, B, N].
    """
    columns, rows = chosen.shape
    depths, count, _ = gradient.shape
    coarse = list(widths).index(search_bits) + 1
    moved = torch.empty_like(gradient)
    grid = (triton.cdiv(rows, ROWS),)
    _block[grid](
        gradient, hessian, chosen, scale, diagonal, weights, tails, moved, columns, rows, start, count,
        WIDTHS=tuple(widths), BASE=base, COARSE=coarse, SEARCH=search_bits,
        E=depths, EP=triton.next_power_of_2(depths), B=DESCENT_COLUMNS, R=ROWS, num_warps=8,
    )  # fmt: skip
    return moved
