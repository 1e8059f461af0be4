"""Codes chosen on the output error of all depths at once.

What: lower `sum_e lam_e |read(q, e) X_e - Y|^2` over the master codes `q`, where `X_e` [K, T] are the inputs that a model
read at depth e produces and `Y` [N, T] the outputs of the float model. With `H_e = X_e X_e^T` and `C_e = Y X_e^T` the sum is
`sum_e lam_e tr(R_e H_e R_e^T - 2 R_e C_e^T)` plus a constant, so tokens are needed no more. Plain `X_e = X` gives the usual
`tr(D H D^T)` with `D = read(q, e) - W`.

How: coordinate descent. One column is chosen anew with all others fixed; given what the other columns leave over, each depth
has a target for it, and the code is taken whose prefixes lie nearest to all targets together. Each step is exact up to
`SEARCH_BITS` bits, where the objective never rises; finer bits come within 2 % of the best. Up to 6 bits every depth
gains; at 8 bits, where rounding alone is lossless, a few dB are paid for what the lower depths win.

Why together: a base compensated alone and refined by plain residual slices is worse at 4 bits than at 2, since the
refinement toward W undoes the compensation of the base.

Trade-off: columns go one by one, so speed is bound by about fifteen small operations each. What columns before and after a
block of 64 add to its gradient is one matrix product, and all tensors are transposed so that a column is contiguous. The
columns of a block are one launch on CUDA (`kernels/descent.py`), one call of C++ on a CPU (`kernels/cpu/descent.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from mobiquant import kernels
from mobiquant import slices as s

BLOCK = kernels.DESCENT_COLUMNS
# prefixes up to this width are searched exhaustively; finer bits follow by rounding inside the cell
SEARCH_BITS = 4


@dataclass(frozen=True)
class Grid:
    """Where the codes of one weight matrix may lie: everything but the codes."""

    scale: Float16[Tensor, "N G"]
    zero: UInt8[Tensor, "N G"]
    slices: tuple[int, ...]
    group_size: int

    def read(self, code: UInt8[Tensor, "N K"]) -> Float[Tensor, "E N K"]:
        """Weights at every depth, fp32."""
        depths = range(1, len(self.slices) + 1)
        return torch.stack([s.read(code, self.scale, self.zero, self.slices, self.group_size, d) for d in depths])


@dataclass(frozen=True)
class Problem:
    """Second moments of one layer; the leading dimension is E, or 1 where all depths share their inputs."""

    hessian: Float[Tensor, "E1 K K"]
    cross: Float[Tensor, "E1 N K"]
    depth_weights: tuple[float, ...]

    def objective(self, weights: Float[Tensor, "E N K"]) -> Float[Tensor, ""]:
        """`sum_e lam_e tr(R_e H_e R_e^T - 2 R_e C_e^T)` in fp64, without the constant."""
        r, h, c = weights.double(), self.hessian.double(), self.cross.double()
        lam = torch.tensor(self.depth_weights, dtype=torch.float64, device=r.device)
        return (((r @ h - 2 * c) * r).sum((1, 2)) * lam).sum()


class Chooser:
    """Finds the code whose reads at all depths lie nearest to one target for each depth.

    All cells of `SEARCH_BITS` bits are tried. Depths beyond them count as one quadratic around the weighted mean of their
    targets, so what a cell can do for them is the distance from that mean to the cell; inside the best cell, each of those
    depths in turn takes the cell nearest to the mean of its own and all deeper targets. `weights` [K, E]: of each column.
    """

    def __init__(self, slices: tuple[int, ...], weights: Float[Tensor, "K E"]):
        self.widths, self.base, device = s.bounds(slices), slices[0], weights.device
        self.search_bits = max(w for w in self.widths if w <= max(SEARCH_BITS, self.base))
        self.coarse = self.widths.index(self.search_bits) + 1
        cells = torch.arange(2**self.search_bits, device=device)
        reads = [s.level(cells >> (self.search_bits - w), slices, d + 1) for d, w in enumerate(self.widths[: self.coarse])]
        centres = torch.stack(reads)
        self.pull = centres * weights[:, : self.coarse, None]  # [K, coarse, cells]
        self.constant = (self.pull * centres).sum(1)  # [K, cells]
        # reach of a cell: from the first to the last centre of the next depth in it
        finer = self.widths[min(self.coarse, len(self.widths) - 1)]
        self.low = (cells + 0.5 ** (finer - self.search_bits + 1)) * 2.0 ** (self.base - self.search_bits)
        self.high = self.low + 2.0**self.base * (0.5**self.search_bits - 0.5**finer)
        fine = weights[:, self.coarse :]  # [K, finer depths]
        self.fine_weight = fine.sum(1).tolist()
        # row d: what the targets of depth d and deeper weigh in their mean
        tails = fine[:, None] * torch.ones(fine.shape[1], fine.shape[1], device=device).triu()
        self.tails = tails / tails.sum(2, keepdim=True)  # [K, finer, finer]

    def __call__(self, target: Float[Tensor, "E N"], column: int) -> Int[Tensor, " N"]:
        """Targets of one column in base steps -> int64 master codes of least weighted squared distance."""
        cost = torch.addmm(self.constant[column], target[: self.coarse].T, self.pull[column], alpha=-2.0)  # [N, cells]
        if self.coarse == len(self.widths):
            return cost.min(1).indices
        means = self.tails[column] @ target[self.coarse :]  # [finer, N]
        outside = means[0, :, None].clamp(self.low, self.high).sub_(means[0, :, None])
        code = cost.addcmul_(outside, outside, value=self.fine_weight[column]).min(1).indices
        width = self.search_bits
        for finer, mean in zip(self.widths[self.coarse :], means, strict=True):
            first = code << (finer - width)
            code = (mean * 2.0 ** (finer - self.base)).floor_().long().clamp_(first, first + (2 ** (finer - width) - 1))
            width = finer
        return code


def descend(code: UInt8[Tensor, "N K"], grid: Grid, problem: Problem, sweeps: int = 1) -> UInt8[Tensor, "N K"]:
    """Coordinate descent over the columns, first to last, `sweeps` times, from any starting codes."""
    columns, work = code.shape[1], _Work(code, grid, problem)
    for _ in range(sweeps):
        for start in range(0, columns, BLOCK):
            work.block(start, min(start + BLOCK, columns))
    return work.chosen.T.contiguous()


def _fused(code: Tensor) -> Callable[..., Tensor] | None:
    """What does a block of columns at once where the codes lie; None where there is no such kernel."""
    if kernels.usable(code):
        from mobiquant.kernels.descent import block

        return block
    from mobiquant.kernels.cpu import descent

    return descent.block if descent.usable(code) else None


class _Work:
    """State of a descent, transposed so that a column is contiguous."""

    def __init__(self, code: UInt8[Tensor, "N K"], grid: Grid, problem: Problem):
        device, columns = code.device, code.shape[1]
        self.hessian = problem.hessian.expand(len(grid.slices), -1, -1)  # [E, K, K]
        diagonal = self.hessian.diagonal(dim1=1, dim2=2)  # [E, K]
        # features that are never active get a floor: nothing pulls at their columns, which keep their codes
        self.diagonal = diagonal.clamp_min(diagonal.mean() * 1e-6 + 1e-30).T.contiguous()  # [K, E]
        self.weights = self.diagonal * torch.tensor(problem.depth_weights, device=device)
        self.choose = Chooser(grid.slices, self.weights)
        codes = torch.arange(2 ** sum(grid.slices), device=device)
        shifts = [sum(grid.slices) - w for w in s.bounds(grid.slices)]
        self.levels = torch.stack([s.level(codes >> shift, grid.slices, d + 1) for d, shift in enumerate(shifts)])  # [E, codes]
        self.scale = s.expand(grid.scale.float(), grid.group_size, columns).T.contiguous()  # [K, N]
        # a copy even where there is one row, whose transpose lies as it is
        self.chosen = code.T.clone(memory_format=torch.contiguous_format)  # [K, N]
        self.reads = grid.read(code).mT.contiguous()  # [E, K, N]
        self.cross = problem.cross.expand(len(grid.slices), -1, -1).mT  # [E, K, N]
        self.fused = _fused(code)
        if self.fused is not None:
            self.hessian = self.hessian.contiguous()
            coarse = len(grid.slices) - self.choose.coarse
            self.tails = (
                torch.nn.functional.pad(self.choose.tails, (self.choose.coarse, 0)).contiguous() if coarse else self.weights
            )

    def block(self, start: int, stop: int) -> None:
        """Choose the codes of the columns from `start` to `stop` anew."""
        columns = slice(start, stop)
        gradient = torch.baddbmm(self.cross[:, columns], self.hessian[:, columns], self.reads, beta=-1)  # [E, B, N]
        if self.fused is None:
            moved = self._plain(columns, gradient)
        else:
            widths, base, bits = self.choose.widths, self.choose.base, self.choose.search_bits
            state = self.hessian, self.chosen, self.scale, self.diagonal, self.weights, self.tails
            moved = self.fused(gradient, *state, widths, base, bits, start, stop)
        self.reads[:, columns] += moved

    def _plain(self, columns: slice, gradient: Float[Tensor, "E B N"]) -> Float[Tensor, "E B N"]:
        """`block` by torch operators; returns by how much weights moved."""
        corner, scale = self.hessian[:, columns, columns].contiguous(), self.scale[columns]
        moved = torch.zeros_like(gradient)
        step = 1 / (self.diagonal[columns, :, None] * scale[:, None])  # [B, E, N]
        old = self.levels.index_select(1, self.chosen[columns].flatten().long()).view(gradient.shape)
        for i, j in enumerate(range(columns.start, columns.stop)):
            slope = torch.baddbmm(gradient[:, i, None], corner[:, i, None, :i], moved[:, :i])[:, 0]  # [E, N]
            code = self.choose(torch.addcmul(old[:, i], slope, step[i], value=-1), j)
            torch.sub(self.levels.index_select(1, code), old[:, i], out=moved[:, i]).mul_(scale[i])
            self.chosen[j] = code
        return moved
