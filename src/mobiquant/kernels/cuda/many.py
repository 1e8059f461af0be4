"""Many tokens by one weight: tokens sorted by depth, dense products of those that have one.

On Hopper `many.cu` makes the weights on their way to the tensor cores. Elsewhere the weight is written out at each depth that
occurs and torch multiplies. Depths stay on the device either way: `many.cu` finds the runs of tokens from how many read each
depth, as do `grouped_mm` and `spread.cu`, which skips depths that no token reads.
"""

import ctypes
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mobiquant.kernels.cuda import compiler
from mobiquant.kernels.cuda.tiles import COLUMNS, LANES, Tiles, definitions

SLOTS, WARPS = 8, 8
# of `many.cu`: rows and threads of a block, steps of columns whose codes are on their way, tiles of x
ROWS, THREADS, STAGES, BUFFERS = 128, 256, 4, 3


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


def counts_of(depth: Int[Tensor, " T"], depths: int) -> Int[Tensor, " E"]:
    """How many tokens read each depth, int32, on the device."""
    counts = torch.zeros(depths, dtype=torch.int32, device=depth.device)
    return counts.scatter_add_(0, depth.long() - 1, torch.ones_like(depth, dtype=torch.int32))


def has_warpgroups(device: torch.device) -> bool:
    """Whether a GPU has the products that `many.cu` is made of."""
    return torch.cuda.get_device_capability(device) == compiler.HOPPER


@lru_cache(maxsize=8)
def fused_parameters(pieces: int) -> type[ctypes.Structure]:
    """`Params` of `many.cu` for a number of pieces."""
    address, whole = ctypes.c_uint64, ctypes.c_int32
    numbers = ("tokens", "rows", "columns", "column_tiles", "groups", "depth", "depths", "tiles")

    class Params(ctypes.Structure):
        _fields_ = [("pieces", address * pieces)] + [(n, address) for n in ("scale", "zero", "x", "out", "order", "counts")] \
            + [(n, whole) for n in numbers]  # fmt: skip

    return Params


def fused(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`product` by `many.cu`."""
    x, (tokens, columns), every = x.contiguous(), x.shape, len(weight.slices)
    out = x.new_empty(tokens, weight.rows)
    own = 64 if tokens <= 64 else 128  # tokens of a block
    p, tiles = fused_parameters(len(weight.pieces))(), -(-tokens // own)
    if isinstance(depth, int):
        p.depth = depth
    else:
        order, counts = depth.argsort(stable=True).int(), counts_of(depth, every)
        # each depth may leave a block unfilled
        p.order, p.counts, tiles = order.data_ptr(), counts.data_ptr(), tiles + every - 1
    for i, piece in enumerate(weight.pieces):
        p.pieces[i] = piece.data_ptr()
    p.scale, p.zero, p.x, p.out = weight.scale.data_ptr(), weight.zero.data_ptr(), x.data_ptr(), out.data_ptr()
    p.tokens, p.rows, p.columns, p.depths, p.tiles = tokens, weight.rows, columns, every, tiles
    p.column_tiles, p.groups = weight.pieces[0].shape[1], weight.scale.shape[1]
    groups = max(1, COLUMNS // weight.group_size) * (ROWS // 32)
    stage = sum(weight.slices) * ROWS * COLUMNS // 8 + groups * 96
    how = ("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", own), *definitions(weight.slices, weight.group_size)
    made = compiler.kernel("many", how, x.device.index or 0)
    # x lies at multiples of 1024
    made.launch(tiles * -(-weight.rows // ROWS), THREADS, p, 1024 + BUFFERS * own * 128 + STAGES * stage)
    return out


def dense(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`product` by weights written out and torch."""
    if isinstance(depth, int):
        return x @ spread(weight, range(depth, depth + 1), x.dtype)[0].T
    every = len(weight.slices)
    order, counts = depth.argsort(stable=True), counts_of(depth, every)
    weights = spread(weight, range(1, every + 1), x.dtype, counts)
    sorted_y = torch.nn.functional.grouped_mm(x[order], weights.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    return torch.empty_like(sorted_y).index_copy_(0, order, sorted_y)


def product(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`x` [T, K] in fp16 or bf16 by the weight, token t at `depth[t]` (from 1)."""
    return (fused if has_warpgroups(x.device) else dense)(x, weight, depth)
