"""Many tokens by one weight: tokens sorted by depth, dense products of those that have one.

On Hopper `many.cu` makes the weights on their way to the tensor cores. Elsewhere the weight is written out at each depth that
occurs and torch multiplies. Depths stay on the device either way: `many.cu` finds the runs of tokens from how many read each
depth, as do `grouped_mm` and `spread.cu`, which skips depths that no token reads.
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from mobiquant.kernels.cuda import compiler
from mobiquant.kernels.cuda.tiles import COLUMNS, LANES, Tiles, definitions, pieces_of

SLOTS, WARPS = 8, 8
# of `many.cu`: rows and threads of a block, most stages, shared memory of a block; threads of `arrange.cu` and `order.cu`
ROWS, THREADS, STAGES, MEMORY, ARRANGE_THREADS, ORDER_THREADS = 128, 384, 6, 227 << 10, 256, 256


class Way(NamedTuple):
    """How blocks of `many.cu` work together: how many share x, and how many share out the columns. A cluster is all of them."""

    share: int
    split: int


# stages that hide the way from memory
LEAST_STAGES = 3
# tokens of one depth up to which `fused` is faster
FUSED_MOST = 1024
# those that are taken; others work too
WAYS = Way(1, 1), Way(2, 1), Way(1, 2), Way(1, 4)


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
        numbers = "rows", "column_tiles", "groups", "steps", "first_block", "share", "split", "stages"
        _fields_ = [("runs", Runs), ("pieces", address * pieces)] + [(n, address) for n in ("scale", "zero", "x", "out")] \
            + [(n, whole) for n in numbers]  # fmt: skip

    return Arrange, Many


def way_for(tiles: int, row_blocks: int, steps: int, processors: int) -> Way:
    """For so many tiles of tokens and blocks of rows: columns are shared out if processors are left over, else x is shared."""
    split = next((n for n in (4, 2) if tiles * row_blocks * n <= processors and steps >= 4 * n), 1)
    return Way(2 if split == 1 and row_blocks > 1 else 1, split)


def launches_for(tiles: int, row_blocks: int, steps: int, processors: int) -> list[tuple[int, Way]]:
    """Blocks of rows and the way of launches that follow each other: those that keep few processors busy have their own."""
    whole = tiles * row_blocks // processors * processors // tiles // 2 * 2
    last = way_for(tiles, row_blocks - whole, steps, processors)
    if not 0 < whole < row_blocks or last.split == 1:
        return [(row_blocks, way_for(tiles, row_blocks, steps, processors))]
    return [(whole, Way(2, 1)), (row_blocks - whole, last)]


def stages_for(own: int, slices: tuple[int, ...], group_size: int) -> tuple[int, int]:
    """How many stages of 128 columns shared memory holds, for tiles of `own` tokens, and the bytes of all."""
    row_tiles = ROWS // 32
    codes = row_tiles * (sum(slices) * 512 + 128 // group_size * 96)
    stage = 2 * own * COLUMNS * 2 + codes + 16  # and two barriers
    # x lies at multiples of 1024
    stages = min(STAGES, (MEMORY - 1024) // stage)
    return stages, 1024 + stages * stage


def tile_for(tokens: int, one_depth: bool, slices: tuple[int, ...], group_size: int) -> int:
    """Tokens of a tile: weights are made for each tile anew, so the most that they fill, while stages are enough."""
    if tokens <= 64:
        return 64
    wide = one_depth and tokens > 128 and stages_for(256, slices, group_size)[0] >= LEAST_STAGES
    return 256 if wide else 128


class Order(ctypes.Structure):
    """`Params` of `order.cu`."""

    _fields_ = [(n, ctypes.c_uint64) for n in ("depth", "order", "counts")] + [
        (n, ctypes.c_int32) for n in ("tokens", "depths")
    ]


def order_of(depth: Int[Tensor, " T"], depths: int) -> tuple[Int32[Tensor, " T"], Int32[Tensor, " E"]]:
    """The order of tokens by depth, those of one depth as they were, and how many read each."""
    depth, p = depth.long().contiguous(), Order()
    order = torch.empty(depth.shape[0], dtype=torch.int32, device=depth.device)
    counts = torch.empty(depths, dtype=torch.int32, device=depth.device)
    p.depth, p.order, p.counts, p.tokens, p.depths = (
        depth.data_ptr(), order.data_ptr(), counts.data_ptr(), depth.shape[0], depths,
    )  # fmt: skip
    # no number of it is an activation's
    made = compiler.kernel("order", (("BF16", 0),), depth.device.index or 0)
    made.launch(1, ORDER_THREADS, p, 8 * (ORDER_THREADS + LANES + 1) * 4, overlap=True)
    return order, counts


def fused(
    x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int, way: Way | None = None, stages: int = STAGES,
    own: int = 0,
) -> Float[Tensor, "T N"]:  # fmt: skip
    """`product` by `arrange.cu` and `many.cu`; `way`, most `stages` and tokens of a tile (`own`: 64, 128, 256) as is best."""
    x, (tokens, columns), device = x.contiguous(), x.shape, x.device.index or 0
    # where all read one depth, the kernel is one of a weight that has no more: stages are smaller
    slices = weight.slices[:depth] if isinstance(depth, int) else weight.slices
    every = len(slices)
    out = x.new_empty(tokens, weight.rows)
    if not tokens:
        return out
    own = own or tile_for(tokens, isinstance(depth, int), slices, weight.group_size)
    pieces = pieces_of(slices)
    arrange, p = (one() for one in fused_parameters(len(pieces)))
    runs, tiles, mixed = p.runs, -(-tokens // own), None
    if isinstance(depth, int):
        runs.depth = depth
    else:
        mixed = order_of(depth, every)
        # each depth may leave a tile unfilled
        runs.order, runs.counts, tiles = mixed[0].data_ptr(), mixed[1].data_ptr(), tiles + every - 1
    runs.tokens, runs.depths, runs.tiles = tokens, every, tiles
    p.column_tiles, p.groups = weight.pieces[0].shape[1], weight.scale.shape[1]
    p.steps = -(-p.column_tiles // 2) * 2
    laid = x.new_empty(tiles, p.steps, own * COLUMNS)
    arrange.runs, arrange.x, arrange.out, arrange.columns, arrange.steps = runs, x.data_ptr(), laid.data_ptr(), columns, p.steps
    how = ("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", own)
    made = compiler.kernel("arrange", how, device)
    made.launch(-(-tiles * own * p.steps * 8 // ARRANGE_THREADS), ARRANGE_THREADS, arrange, overlap=True)
    for i in range(len(pieces)):
        p.pieces[i] = weight.pieces[i].data_ptr()
    p.scale, p.zero, p.x, p.out = weight.scale.data_ptr(), weight.zero.data_ptr(), laid.data_ptr(), out.data_ptr()
    p.rows, row_blocks = weight.rows, -(-weight.rows // ROWS)
    held, memory = stages_for(own, slices, weight.group_size)
    p.stages = min(stages, held)
    made = compiler.kernel("many", (*how, *definitions(slices, weight.group_size)), device)
    # how many tiles mixed depths have is not known here: taken for as many as half of the depths would leave
    likely = -(-tokens // own) + (every // 2 if mixed else 0)
    shape = likely, row_blocks, p.steps, compiler.processors(x.device)
    launches = [(row_blocks, way or way_for(*shape))] if way or mixed else launches_for(*shape)
    for count, (p.share, p.split) in launches:
        # a last cluster may have a block without rows
        blocks = tiles * -(-count // p.share) * p.share * p.split
        made.launch(blocks, THREADS, p, memory, overlap=True, cluster=p.share * p.split)
        p.first_block += count
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


def fused_is_faster(tokens: int, depth: Int[Tensor, " T"] | int) -> bool:
    """Whether `fused` is faster than `dense` (docs/kernels.md)."""
    return not isinstance(depth, int) or tokens <= FUSED_MOST


def product(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`x` [T, K] in fp16 or bf16 by the weight, token t at `depth[t]` (from 1)."""
    return (fused if has_warpgroups(x.device) and fused_is_faster(x.shape[0], depth) else dense)(x, weight, depth)
