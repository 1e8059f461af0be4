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

Trade-off: columns go one by one, so speed is bound by about fifteen small operations each; updates of the other columns are
gathered in blocks of 64 and done as matrix products, and all tensors are transposed so that a column is contiguous.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from mobiquant import slices as s

BLOCK = 64
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
    device, depths, (rows, columns) = code.device, len(grid.slices), code.shape
    hessian = problem.hessian.expand(depths, -1, -1)
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # [E, K]
    # features that are never active get a floor: nothing pulls at their columns, which keep their codes
    diagonal = diagonal.clamp_min(diagonal.mean() * 1e-6 + 1e-30).T.contiguous()  # [K, E]
    choose = Chooser(grid.slices, diagonal * torch.tensor(problem.depth_weights, device=device))
    codes = torch.arange(2 ** sum(grid.slices), device=device)
    shifts = [sum(grid.slices) - w for w in s.bounds(grid.slices)]
    levels = torch.stack([s.level(codes >> shift, grid.slices, d + 1) for d, shift in enumerate(shifts)])  # [E, codes]
    scale = s.expand(grid.scale.float(), grid.group_size, columns).T.contiguous()  # [K, N]
    chosen = code.T.long()  # [K, N]
    gradient = hessian @ grid.read(code).mT - problem.cross.mT  # [E, K, N]
    for sweep in range(sweeps):
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            corner = hessian[:, start:stop, start:stop].contiguous()
            moved = torch.zeros(depths, stop - start, rows, device=device)
            step = 1 / (diagonal[start:stop, :, None] * scale[start:stop, None])  # [block, E, N]
            old = levels.index_select(1, chosen[start:stop].flatten()).view(depths, -1, rows)
            for i, j in enumerate(range(start, stop)):
                slope = torch.baddbmm(gradient[:, j, None], corner[:, i, None, :i], moved[:, :i])[:, 0]  # [E, N]
                chosen[j] = choose(torch.addcmul(old[:, i], slope, step[i], value=-1), j)
                torch.sub(levels.index_select(1, chosen[j]), old[:, i], out=moved[:, i]).mul_(scale[j])
            # the last sweep never looks back
            rest = stop if sweep == sweeps - 1 else 0
            gradient[:, rest:].baddbmm_(hessian[:, rest:, start:stop], moved)
    return chosen.T.to(torch.uint8).contiguous()
