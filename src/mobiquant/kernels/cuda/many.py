"""Many tokens by one weight: tokens sorted by depth, the weight written out at each depth that occurs, dense products.

Depths stay on the device: `grouped_mm` takes the ends of the runs of tokens from device memory, and `spread.cu` skips depths
that no token reads. Where all tokens read one depth that the host knows, it is one matrix and one product.
"""

import ctypes
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mobiquant.kernels.cuda import compiler
from mobiquant.kernels.cuda.tiles import LANES, Tiles, definitions

SLOTS, WARPS = 8, 8


@lru_cache(maxsize=8)
def parameters(pieces: int) -> type[ctypes.Structure]:
    """`Params` of `spread.cu` for a number of pieces."""
    address, whole = ctypes.c_uint64, ctypes.c_int32

    class Params(ctypes.Structure):
        _fields_ = [("pieces", address * pieces)] + [(n, address) for n in ("scale", "zero", "out", "counts")] \
            + [("depth", whole * SLOTS)] \
            + [(n, whole) for n in ("slots", "rows", "columns", "column_tiles", "groups")]  # fmt: skip

    return Params


def spread(weight: Tiles, depths: range, dtype: torch.dtype, counts: Int[Tensor, " S"] | None = None) -> Float[Tensor, "S N K"]:
    """The weight at each depth of `depths`, in fp16 or bf16; where `counts` (int32, on the device) is 0, nothing is written."""
    out = torch.empty(len(depths), weight.rows, weight.columns, dtype=dtype, device=weight.scale.device)
    p = parameters(len(weight.pieces))()
    for i, piece in enumerate(weight.pieces):
        p.pieces[i] = piece.data_ptr()
    p.scale, p.zero, p.out = weight.scale.data_ptr(), weight.zero.data_ptr(), out.data_ptr()
    p.counts = 0 if counts is None else counts.data_ptr()
    for slot, depth in enumerate(depths):
        p.depth[slot] = depth
    p.slots, p.rows, p.columns = len(depths), weight.rows, weight.columns
    p.column_tiles, p.groups = weight.pieces[0].shape[1], weight.scale.shape[1]
    tiles = weight.pieces[0].shape[0] * p.column_tiles
    how = ("BF16", int(dtype == torch.bfloat16)), *definitions(weight.slices, weight.group_size)
    made = compiler.kernel("spread", how, out.device.index or 0)
    made.launch(-(-tiles // WARPS), WARPS * LANES, p, SLOTS * 8)
    return out


def product(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`x` [T, K] in fp16 or bf16 by the weight, token t at `depth[t]` (from 1)."""
    if isinstance(depth, int):
        return x @ spread(weight, range(depth, depth + 1), x.dtype)[0].T
    every = len(weight.slices)
    order = depth.argsort(stable=True)
    counts = torch.zeros(every, dtype=torch.int32, device=x.device).scatter_add_(
        0, depth.long() - 1, torch.ones_like(depth, dtype=torch.int32)
    )
    weights = spread(weight, range(1, every + 1), x.dtype, counts)
    sorted_y = torch.nn.functional.grouped_mm(x[order], weights.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    return torch.empty_like(sorted_y).index_copy_(0, order, sorted_y)
