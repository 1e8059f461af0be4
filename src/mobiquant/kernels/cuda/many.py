"""Many tokens by the weights of layers that read them: tokens sorted by depth, dense products of those that have one.

On Hopper `many.cu` makes the weights on their way to the tensor cores, of up to four layers in one launch. Elsewhere the weight
is written out at each depth that occurs and torch multiplies. Depths stay on the device either way: `many.cu` finds the runs of
tokens from how many read each depth, as do `grouped_mm` and `spread.cu`, which skips depths that no token reads.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from mobiquant.kernels.cuda import compiler
from mobiquant.kernels.cuda.tiles import COLUMNS, LANES, Tiles, definitions, pieces_of

SLOTS, WARPS = 8, 8
# of `many.cu`: rows and threads of a block, most stages, shared memory of a block; threads of `arrange.cu` and `order.cu`
ROWS, THREADS, STAGES, MEMORY, ARRANGE_THREADS, ORDER_THREADS = 128, 384, 6, 227 << 10, 256, 256
# stages that hide the way from memory
LEAST_STAGES = 3
# tokens of one depth up to which `fused` is faster: of more than four bits, and of fewer
FUSED_MOST = 256, 1024
# weights of one launch, as in `bring.h`
MEMBERS = 4


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

    class Member(ctypes.Structure):
        _fields_ = [("pieces", address * pieces)] + [(n, address) for n in ("scale", "zero", "out")] \
            + [("rows", whole), ("end", whole)]  # fmt: skip

    class Many(ctypes.Structure):
        numbers = "column_tiles", "groups", "steps", "first_block", "split", "stages"
        _fields_ = [("runs", Runs), ("members", Member * MEMBERS), ("x", address)] + [(n, whole) for n in numbers]

    return Arrange, Many


def split_for(tiles: int, row_blocks: int, steps: int, processors: int) -> int:
    """Blocks that share out the columns, of so many tiles of tokens and blocks of rows: two if processors are left over."""
    return 2 if 2 * tiles * row_blocks <= processors and steps >= 8 else 1


def launches_for(tiles: int, row_blocks: int, steps: int, processors: int) -> list[tuple[int, int]]:
    """Blocks of rows and their split, of one launch after another: those that keep few processors busy have their own."""
    whole = tiles * row_blocks // processors * processors // tiles
    last = split_for(tiles, row_blocks - whole, steps, processors)
    if not 0 < whole < row_blocks or last == 1:
        return [(row_blocks, split_for(tiles, row_blocks, steps, processors))]
    return [(whole, 1), (row_blocks - whole, last)]


def stages_for(own: int, slices: tuple[int, ...], group_size: int) -> tuple[int, int]:
    """How many stages of 128 columns shared memory holds, for tiles of `own` tokens, and the bytes of all."""
    row_tiles = ROWS // 32
    codes = row_tiles * (sum(slices) * 512 + 128 // group_size * 96)
    stage = 2 * own * COLUMNS * 2 + codes + 16  # and two barriers
    # x lies at multiples of 1024
    stages = min(STAGES, (MEMORY - 1024) // stage)
    return stages, 1024 + stages * stage


def tile_for(tokens: int, row_blocks: int, one_depth: bool, stages_of_256: int, processors: int) -> int:
    """Tokens of a tile. Weights are made for each tile anew, so the most that keep half of the processors busy."""
    if tokens <= 64 or (tokens <= 128 and 4 * row_blocks <= processors):
        return 64
    wide = one_depth and tokens > 128 and stages_of_256 >= LEAST_STAGES
    return 256 if wide and -(-tokens // 256) * row_blocks * 9 >= processors * 4 else 128


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
    x: Float[Tensor, "T K"], weights: Sequence[Tiles], depth: Int[Tensor, " T"] | int, split: int | None = None,
    stages: int = STAGES, own: int = 0,
) -> list[Float[Tensor, "T _"]]:  # fmt: skip
    """`product` by `arrange.cu` and `many.cu`; `split`, most `stages` and tokens of a tile (`own`: 64, 128, 256) as is best."""
    x, first, device = x.contiguous(), weights[0], x.device.index or 0
    out = [x.new_empty(x.shape[0], weight.rows) for weight in weights]
    if not x.shape[0]:
        return out
    # where all read one depth, the kernel is one of weights that have no more: stages are smaller
    slices = first.slices[:depth] if isinstance(depth, int) else first.slices
    every, pieces, processors = len(slices), pieces_of(slices), compiler.processors(x.device)
    row_blocks = sum(-(-weight.rows // ROWS) for weight in weights)
    wide = stages_for(256, slices, first.group_size)[0]
    own = own or tile_for(x.shape[0], row_blocks, isinstance(depth, int), wide, processors)
    p = fused_parameters(len(pieces))[1]()
    runs, tiles = p.runs, -(-x.shape[0] // own)
    mixed = None if isinstance(depth, int) else order_of(depth, every)
    if mixed is None:
        runs.depth = depth
    else:
        # each depth may leave a tile unfilled
        runs.order, runs.counts, tiles = mixed[0].data_ptr(), mixed[1].data_ptr(), tiles + every - 1
    runs.tokens, runs.depths, runs.tiles = x.shape[0], every, tiles
    p.column_tiles, p.groups = first.pieces[0].shape[1], first.scale.shape[1]
    p.steps = -(-p.column_tiles // 2) * 2
    laid = _arranged(x, p, own)
    p.x, end = laid.data_ptr(), 0
    for to, weight, made in zip(p.members, weights, out, strict=False):
        end += -(-weight.rows // ROWS)
        for i in range(len(pieces)):
            to.pieces[i] = weight.pieces[i].data_ptr()
        to.scale, to.zero, to.out = weight.scale.data_ptr(), weight.zero.data_ptr(), made.data_ptr()
        to.rows, to.end = weight.rows, end
    held, memory = stages_for(own, slices, first.group_size)
    p.stages = min(stages, held)
    kernel = compiler.kernel("many", (*_compiled_for(x, own), *definitions(slices, first.group_size)), device)
    # how many tiles mixed depths have is not known here: taken for as many as half of the depths would leave
    shape = -(-x.shape[0] // own) + (every // 2 if mixed else 0), row_blocks, p.steps, processors
    launches = [(row_blocks, split or split_for(*shape))] if split or mixed else launches_for(*shape)
    for count, p.split in launches:
        kernel.launch(tiles * count * p.split, THREADS, p, memory, overlap=True, cluster=p.split)
        p.first_block += count
    return out


def _compiled_for(x: Tensor, own: int) -> tuple[tuple[str, int], ...]:
    return ("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", own)


def _arranged(x: Float[Tensor, "T K"], p: ctypes.Structure, own: int) -> Tensor:
    """x as `many.cu` wants it, in tiles of `own` tokens."""
    arrange = fused_parameters(len(p.members[0].pieces))[0]()
    laid = x.new_empty(p.runs.tiles, p.steps, own * COLUMNS)
    arrange.runs, arrange.x, arrange.out = p.runs, x.data_ptr(), laid.data_ptr()
    arrange.columns, arrange.steps = x.shape[1], p.steps
    made = compiler.kernel("arrange", _compiled_for(x, own), x.device.index or 0)
    made.launch(-(-p.runs.tiles * own * p.steps * 8 // ARRANGE_THREADS), ARRANGE_THREADS, arrange, overlap=True)
    return laid


def dense(x: Float[Tensor, "T K"], weights: Sequence[Tiles], depth: Int[Tensor, " T"] | int) -> list[Float[Tensor, "T _"]]:
    """`product` by weights written out and torch."""
    if isinstance(depth, int):
        return [x @ spread(weight, range(depth, depth + 1), x.dtype)[0].T for weight in weights]
    every = len(weights[0].slices)
    order, counts = order_of(depth, every)
    ends, sorted_x, made = counts.cumsum(0, dtype=torch.int32), x[order], []
    for weight in weights:
        spread_out = spread(weight, range(1, every + 1), x.dtype, counts)
        sorted_y = torch.nn.functional.grouped_mm(sorted_x, spread_out.transpose(1, 2), offs=ends)
        made.append(torch.empty_like(sorted_y).index_copy_(0, order.long(), sorted_y))
    return made


def fused_is_faster(tokens: int, depth: Int[Tensor, " T"] | int, slices: tuple[int, ...]) -> bool:
    """Whether `fused` was faster than `dense` on an H200 (docs/kernels.md): but for wide codes of many tokens at one depth."""
    return not isinstance(depth, int) or tokens <= FUSED_MOST[sum(slices[:depth]) <= 4]


def product(x: Float[Tensor, "T K"], weights: Sequence[Tiles], depth: Int[Tensor, " T"] | int) -> list[Float[Tensor, "T _"]]:
    """`x` [T, K] in fp16 or bf16 by weights that read it, token t at `depth[t]` (from 1)."""
    way = fused if has_warpgroups(x.device) and fused_is_faster(x.shape[0], depth, weights[0].slices) else dense
    parts = (way(x, weights[i : i + MEMBERS], depth) for i in range(0, len(weights), MEMBERS))
    return [made for part in parts for made in part]
