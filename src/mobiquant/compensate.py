"""Codes chosen on the output error of all depths at once.

What: lower `sum_e lam_e |read(q, e) X_e - Y|^2` over the master codes `q`, where `X_e` [K, T] are the inputs that a model
read at depth e produces and `Y` [N, T] the outputs of the float model. With `H_e = X_e X_e^T` and `C_e = Y X_e^T` the sum is
`sum_e lam_e tr(R_e H_e R_e^T - 2 R_e C_e^T)` plus a constant, so tokens are needed no more. Plain `X_e = X` gives the usual
`tr(D H D^T)` with `D = read(q, e) - W`.

How: coordinate descent. One column is chosen anew with all others fixed; given what the other columns leave over, each depth
has a target for it, and the code is taken whose prefixes lie nearest to all targets together. Each step is exact up to
`SEARCH_BITS` bits and the objective never rises by more than what the rounding of finer bits adds. Up to 6 bits every depth
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
SEARCH_BITS = 6


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
    """Finds the code whose reads at all depths lie nearest to one target for each depth."""

    def __init__(self, slices: tuple[int, ...], device: torch.device):
        self.total, self.base = sum(slices), slices[0]
        widths = s.bounds(slices)
        self.search_bits = max(w for w in widths if w <= max(SEARCH_BITS, widths[0]))
        leaves = torch.arange(2**self.search_bits, device=device)
        # centre of the cell that a leaf lies in at each depth; beyond the search, the leaf's own centre
        self.centres = torch.stack(
            [
                s.level(leaves >> max(self.search_bits - w, 0), slices, d + 1)
                if w <= self.search_bits
                else (leaves + 0.5) * 2.0 ** (self.base - self.search_bits)
                for d, w in enumerate(widths)
            ]
        )  # [E, leaves]
        codes = torch.arange(2**self.total, device=device)
        self.levels = torch.stack([s.level(codes >> (self.total - w), slices, d + 1) for d, w in enumerate(widths)])

    def __call__(self, target: Float[Tensor, "E N"], weight: Float[Tensor, "E 1"]) -> Int[Tensor, " N"]:
        """Targets in base steps, weights of the depths -> int64 master codes of least weighted squared distance."""
        weighted = self.centres * weight
        constant = (weighted * self.centres).sum(0)
        leaf = torch.addmm(constant, target.T, weighted, alpha=-2.0).argmin(1)
        rest = self.total - self.search_bits
        if not rest:
            return leaf
        low = leaf << rest
        fine = (target[-1] * 2.0 ** (self.total - self.base)).floor().long()
        return fine.clamp(low, low + (2**rest - 1))


def descend(code: UInt8[Tensor, "N K"], grid: Grid, problem: Problem, sweeps: int = 1) -> UInt8[Tensor, "N K"]:
    """Coordinate descent over the columns, first to last, `sweeps` times, from any starting codes."""
    device, depths, (rows, columns) = code.device, len(grid.slices), code.shape
    choose, lam = Chooser(grid.slices, device), torch.tensor(problem.depth_weights, device=device)
    hessian = problem.hessian.expand(depths, -1, -1)
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # [E, K]
    # features that are never active get a floor: nothing pulls at their columns, which keep their codes
    diagonal = diagonal.clamp_min(diagonal.mean() * 1e-6 + 1e-30).T.contiguous()  # [K, E]
    weights = (diagonal * lam)[:, :, None]  # [K, E, 1]
    scale = s.expand(grid.scale.float(), grid.group_size, columns).T.contiguous()  # [K, N]
    chosen = code.T.long()  # [K, N]
    gradient = hessian @ grid.read(code).mT - problem.cross.mT  # [E, K, N]
    for sweep in range(sweeps):
        last = sweep == sweeps - 1
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            moved = torch.zeros(depths, stop - start, rows, device=device)
            corner = hessian[:, start:stop, start:stop].contiguous()
            for j in range(start, stop):
                i = j - start
                slope = torch.baddbmm(gradient[:, j, None], corner[:, i, None, :i], moved[:, :i])[:, 0]  # [E, N]
                old = choose.levels[:, chosen[j]]  # [E, N]
                target = old - slope / (diagonal[j][:, None] * scale[j])
                chosen[j] = choose(target, weights[j])
                moved[:, i] = (choose.levels[:, chosen[j]] - old) * scale[j]
            # the last sweep never looks back
            rest = stop if last else 0
            gradient[:, rest:].baddbmm_(hessian[:, rest:, start:stop], moved)
    return chosen.T.to(torch.uint8).contiguous()
