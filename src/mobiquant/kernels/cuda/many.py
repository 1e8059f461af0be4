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
# of `many.cu`: rows and threads of a block, steps whose codes are on their way, tiles of x; of `arrange.cu`
ROWS, THREADS, STAGES, BUFFERS, ARRANGE_THREADS = 128, 288, 6, 6, 256


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
def fused_parameters(pieces: int) -> tuple[type[ctypes.Structure], type[ctypes.Structure]]:
    """`Params` of `arrange.cu` and, for a number of pieces, of `many.cu`."""
    address, whole = ctypes.c_uint64, ctypes.c_int32

    class Runs(ctypes.Structure):
        _fields_ = [(n, address) for n in ("order", "counts")] + [(n, whole) for n in ("tokens", "depth", "depths", "tiles")]

    class Arrange(ctypes.Structure):
        _fields_ = [("runs", Runs)] + [(n, address) for n in ("x", "out")] + [(n, whole) for n in ("columns", "steps")]

    class Many(ctypes.Structure):
        _fields_ = [("runs", Runs), ("pieces", address * pieces)] + [(n, address) for n in ("scale", "zero", "x", "out")] \
            + [(n, whole) for n in ("rows", "column_tiles", "groups", "steps")]  # fmt: skip

    return Arrange, Many


def fused(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`product` by `arrange.cu` and `many.cu`."""
    x, (tokens, columns), every, device = x.contiguous(), x.shape, len(weight.slices), x.device.index or 0
    out = x.new_empty(tokens, weight.rows)
    own = 64 if tokens <= 64 else 128  # tokens of a tile
    arrange, p = (one() for one in fused_parameters(len(weight.pieces)))
    runs, tiles = p.runs, -(-tokens // own)
    if isinstance(depth, int):
        runs.depth = depth
    else:
        order, counts = depth.argsort(stable=True).int(), counts_of(depth, every)
        # each depth may leave a tile unfilled
        runs.order, runs.counts, tiles = order.data_ptr(), counts.data_ptr(), tiles + every - 1
    runs.tokens, runs.depths, runs.tiles = tokens, every, tiles
    p.column_tiles, p.groups = weight.pieces[0].shape[1], weight.scale.shape[1]
    p.steps = -(-p.column_tiles // 2) * 2
    laid = x.new_empty(tiles, p.steps, own * COLUMNS)
    arrange.runs, arrange.x, arrange.out, arrange.columns, arrange.steps = runs, x.data_ptr(), laid.data_ptr(), columns, p.steps
    how = ("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", own)
    made = compiler.kernel("arrange", how, device)
    made.launch(-(-tiles * own * p.steps * 2 // ARRANGE_THREADS), ARRANGE_THREADS, arrange, overlap=True)
    for i, piece in enumerate(weight.pieces):
        p.pieces[i] = piece.data_ptr()
    p.scale, p.zero, p.x, p.out = weight.scale.data_ptr(), weight.zero.data_ptr(), laid.data_ptr(), out.data_ptr()
    p.rows = weight.rows
    stage = sum(weight.slices) * 128 + max(1, COLUMNS // weight.group_size) * 256
    # x lies at multiples of 1024; barriers are the last
    memory = 1024 + BUFFERS * (own * COLUMNS * 2 + 16) + WARPS * STAGES * stage
    made = compiler.kernel("many", (*how, *definitions(weight.slices, weight.group_size)), device)
    made.launch(tiles * -(-weight.rows // ROWS), THREADS, p, memory, overlap=True)
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


def fused_is_faster(tokens: int, weight: Tiles, depth: Int[Tensor, " T"] | int) -> bool:
    """Whether `fused` was faster on an H200 (docs/kernels.md): where depths are mixed, or for many rows and few tokens."""
    return not isinstance(depth, int) or (tokens <= 128 and weight.rows >= 2 * weight.columns)


def product(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`x` [T, K] in fp16 or bf16 by the weight, token t at `depth[t]` (from 1)."""
    return (fused if has_warpgroups(x.device) and fused_is_faster(x.shape[0], weight, depth) else dense)(x, weight, depth)
