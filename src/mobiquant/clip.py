"""Ranges of the weight groups, chosen for all depths at once.

What: for each group, shrink its range [min, max] by the ratio that gives the least weighted error over every depth.

Why all depths: the range of all residual slices is exactly one base cell, so a range tuned for 2 bits alone caps every
finer depth (4.4 dB lost at 4 bits on Gaussian weights, nothing gained beyond 6). Cells reach half a base
step beyond the end levels, so that for a symmetric group a ratio of (2^b_1 - 1) / 2^b_1 just covers [min, max]; below it the
base gets finer and the tails are clipped.
"""

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from mobiquant import slices as s

# weights that a CPU works on at once: all that is made of them on the way stays near
IN_CACHE = 2**18
RATIOS = (1.0, 0.9, 0.82, 0.75, 0.7, 0.65, 0.6, 0.55)


def group_reduce(values: Float[Tensor, "N K"], group_size: int, how: str, fill: float) -> Float[Tensor, "N G"]:
    """Reduce each group with torch's amin, amax or sum; a short last group is filled with `fill`."""
    padding = -values.shape[1] % group_size
    padded = torch.nn.functional.pad(values, (0, padding), value=fill)
    return getattr(padded.view(values.shape[0], -1, group_size), how)(-1)  # [N, G, g] -> [N, G]


def min_max(
    weight: Float[Tensor, "N K"], slices: tuple[int, ...], group_size: int, ratio: float = 1.0
) -> tuple[Float16[Tensor, "N G"], UInt8[Tensor, "N G"]]:
    """Scale and zero point of the range [ratio * min, ratio * max] of each group."""
    weight = weight.float()
    low = group_reduce(weight, group_size, "amin", float("inf"))
    high = group_reduce(weight, group_size, "amax", float("-inf"))
    return s.from_range(low * ratio, high * ratio, slices)


def search(
    weight: Float[Tensor, "N K"],
    importance: Float[Tensor, " K"],
    slices: tuple[int, ...],
    group_size: int,
    depth_weights: tuple[float, ...],
    ratios: tuple[float, ...] = RATIOS,
) -> tuple[Float16[Tensor, "N G"], UInt8[Tensor, "N G"]]:
    """Scale and zero point of the ratio with the least `sum_e lam_e sum_k h_k (read(q, e) - W)^2` in each group.

    `importance` is the mean square of each input feature, `depth_weights` the `lam_e`, one for each slice.
    """
    assert weight.shape[1] == importance.shape[0]
    rows = max(1, IN_CACHE // weight.shape[1])
    if weight.device.type == "cpu" and weight.shape[0] > rows:
        settings = importance, slices, group_size, depth_weights, ratios
        parts = [search(part, *settings) for part in weight.split(rows)]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])
    best_scale, best_zero = min_max(weight, slices, group_size, ratios[0])
    best_cost = torch.full_like(best_scale, float("inf"), dtype=torch.float32)
    for ratio in ratios:
        scale, zero = min_max(weight, slices, group_size, ratio)
        u = s.position(weight, scale, zero, slices, group_size)
        error = torch.zeros_like(u)
        for lam, width in zip(depth_weights, s.bounds(slices), strict=True):
            cells = 2.0 ** (width - slices[0])
            centre = ((u * cells).floor_().clamp_(0, 2**width - 1) + 0.5) / cells
            error.addcmul_(centre.sub_(u), centre, value=lam)
        cost = group_reduce(error * importance, group_size, "sum", 0.0) * scale.float() ** 2
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
