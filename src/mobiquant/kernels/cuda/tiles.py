"""The layout that the CUDA kernels read, made once from the stored planes, and back.

What: a slice is cut into pieces of 2 bits and 1 bit, a piece into tiles of 32 rows and 64 columns, and a tile into what each of
32 lanes of a warp needs of it: 8 bytes for each bit of the piece, in the order of the fragments of `mma.m16n8k32`. So one load
of 16 bytes gives a lane its 64 weights of two bits, a warp reads 512 bytes in a row, and a piece that no token needs is not
touched. Shifting a word and masking it gives four neighbouring codes in the four bytes that a tensor core takes.

Where a weight lies: row `32 t + 16 m + 8 u + r`, column `64 c + 32 f + 8 j + 4 h + i` is of tile (t, c) and lane `4 r + j`,
there in byte i of word `2 m + f` and field `2 h + u` for two bits, of word `m` and field `4 f + 2 h + u` for one bit; fields
are counted from the upper end of the byte. The eight columns that a lane has of each half are neighbours, and so are its x.

Scales and zero points [row tiles, G, 8, 4] lie so that a lane loads those of its four rows at once.

Bytes are those of the planes where rows fill tiles of 32 and columns tiles of 64; the rest is padding. Groups are there for an
even number of column tiles: the kernels read two at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float16, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

from mobiquant import pack
from mobiquant import slices as s
from mobiquant.router import Router

ROWS, COLUMNS, LANES = 32, 64, 32
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Piece:
    """Part of a slice, 2 bits or 1 bit wide: the depth of the slice (from 1) and the bits up to and with it."""

    width: int
    depth: int
    end: int


def pieces_of(slices: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of all slices, most significant first."""
    parts = [(width, depth) for depth, total in enumerate(slices, 1) for width in [2] * (total // 2) + [1] * (total % 2)]
    ends = accumulate(width for width, _ in parts)
    return tuple(Piece(width, depth, end) for (width, depth), end in zip(parts, ends, strict=True))


@dataclass(frozen=True)
class Tiles:
    """One weight [N, K] in the layout of the kernels; `pieces` uint8 [row tiles, column tiles, 32, 8 * width]."""

    pieces: list[UInt8[Tensor, "R C 32 _"]]
    scale: Float16[Tensor, "R G 8 4"]
    zero: UInt8[Tensor, "R G 8 4"]
    rows: int
    columns: int
    slices: tuple[int, ...]
    group_size: int


def definitions(slices: tuple[int, ...], group_size: int) -> tuple[tuple[str, int | str], ...]:
    """What the kernels that read tiles are compiled for."""
    pieces = pieces_of(slices)
    listed = {"WIDTHS": [p.width for p in pieces], "DEPTHS": [p.depth for p in pieces], "ENDS": [p.end for p in pieces]}
    words = tuple((name, ",".join(map(str, values))) for name, values in listed.items())
    return ("GROUP", group_size), ("BASE", slices[0]), ("PIECES", len(pieces)), *words


def unfit(slices: tuple[int, ...], group_size: int, columns: int) -> str:
    """Why a weight cannot be laid out for the kernels, in words; empty where it can."""
    if group_size not in GROUPS:
        return f"groups have {group_size} weights, not {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}"
    if columns % 8:
        return f"layers have {columns} inputs, which is no multiple of 8"
    if slices[0] > 6:
        return f"the base slice has {slices[0]} bits, more than 6"
    return ""


def _tiled(values: Tensor) -> Tensor:
    """[N, K] -> [t, c, r, j, m, f, i, h, u], padded with zeros; letters as above."""
    rows, columns = values.shape
    padded = pad(values, (0, -columns % COLUMNS, 0, -rows % ROWS))
    split = padded.view(-1, 2, 2, 8, padded.shape[1] // COLUMNS, 2, 4, 2, 4)  # t m u r c f j h i
    return split.permute(0, 4, 3, 6, 1, 5, 8, 7, 2)


def _untiled(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """[t, c, r, j, m, f, i, h, u] -> [N, K]."""
    split = tiled.permute(0, 4, 8, 2, 1, 5, 3, 7, 6)  # t m u r c f j h i
    return split.reshape(tiled.shape[0] * ROWS, -1)[:rows, :columns]


def _shifts(width: int, device: torch.device) -> Tensor:
    """Place of each field in its byte: [1, h, u] for 2 bits, [f, 1, h, u] for 1 bit (`_tiled` from f or i on)."""
    field = torch.arange(4, device=device).view(2, 2)
    if width == 1:
        field = field + 4 * torch.arange(2, device=device).view(2, 1, 1, 1)
    return 8 - width * (field + 1)


def lay_out(values: UInt8[Tensor, "N K"], width: int) -> UInt8[Tensor, "R C 32 B"]:
    """Values of one piece -> its tiles."""
    tiled = _tiled(values) << _shifts(width, values.device).to(torch.uint8)
    # fields have no bit in common, so their sum is their union: bytes [t, c, r, j, m, f, i] or [t, c, r, j, m, i]
    made = tiled.sum((-1, -2) if width == 2 else (-1, -2, 5), dtype=torch.uint8)
    return made.reshape(tiled.shape[0], tiled.shape[1], LANES, 8 * width)


def take_up(tiles: UInt8[Tensor, "R C 32 B"], width: int, rows: int, columns: int) -> UInt8[Tensor, "N K"]:
    """Tiles of one piece -> its values."""
    made = tiles.view(*tiles.shape[:2], 8, 4, 2, 2 if width == 2 else 1, 4, 1, 1)  # t c r j m f i h u
    fields = (made >> _shifts(width, tiles.device).to(torch.uint8)) & (2**width - 1)
    return _untiled(fields, rows, columns)


def _by_lane(values: Tensor, groups: int) -> Tensor:
    """[N, G] -> [t, groups, r, (m u)], padded with zeros."""
    padded = pad(values, (0, groups - values.shape[1], 0, -values.shape[0] % ROWS))
    return padded.view(-1, 4, 8, groups).permute(0, 3, 2, 1).contiguous()


def prepare(
    planes: Sequence[UInt8[Tensor, "_ N K8"]], scale: Float16[Tensor, "N G"], zero: UInt8[Tensor, "N G"],
    slices: tuple[int, ...], group_size: int, columns: int,
) -> Tiles:  # fmt: skip
    """Stored planes -> tiles. Raises ValueError where `unfit` says why not."""
    if reason := unfit(slices, group_size, columns):
        raise ValueError(reason)
    made = []
    for plane, width in zip(planes, slices, strict=True):
        code, left = pack.unpack([plane], columns), width
        while left:
            part = min(2, left)
            left -= part
            made.append(lay_out((code >> left) & (2**part - 1), part))
    # those of two whole tiles are there to be read, whether they have columns or not
    groups = -(-made[0].shape[1] // 2) * 2 * COLUMNS // group_size
    return Tiles(made, _by_lane(scale, groups), _by_lane(zero, groups), scale.shape[0], columns, slices, group_size)


def restore(tiles: Tiles) -> tuple[list[UInt8[Tensor, "_ N K8"]], Float16[Tensor, "N G"], UInt8[Tensor, "N G"]]:
    """Tiles -> stored planes, scales and zero points, as they were."""
    planes, values = [], [0] * len(tiles.slices)
    for piece, part in zip(pieces_of(tiles.slices), tiles.pieces, strict=True):
        own = take_up(part, piece.width, tiles.rows, tiles.columns)
        values[piece.depth - 1] = values[piece.depth - 1] << piece.width | own  # type: ignore[assignment]
    for code, width in zip(values, tiles.slices, strict=True):
        planes += pack.pack(code, (width,))  # type: ignore[arg-type]
    groups = s.groups(tiles.columns, tiles.group_size)
    scale, zero = (
        part.permute(0, 3, 2, 1).reshape(-1, part.shape[1])[: tiles.rows, :groups].contiguous()
        for part in (tiles.scale, tiles.zero)
    )
    return planes, scale, zero


@dataclass(frozen=True)
class RouterTiles:
    """A router whose first matrix lies in fragments of the tensor cores, the rest as stored."""

    weight: Int8[Tensor, "H C 4 32 16"]
    router: Router


def prepare_router(router: Router) -> RouterTiles:
    """A stored router -> tiles of 32 hidden units and 64 columns, in each the 16 bytes of a lane for each (m, f)."""
    tiled = _tiled(router.weight)  # t c r j m f i h u
    laid = tiled.permute(0, 1, 4, 5, 2, 3, 7, 8, 6)  # t c m f r j h u i
    return RouterTiles(laid.reshape(*tiled.shape[:2], 4, LANES, 16).contiguous(), router)


def check_router(router: Router) -> bool:
    """Whether the kernels can score with a router: no more hidden units and slices than they hold."""
    return router.weight.shape[0] <= 128 and router.out.shape[0] <= s.MAX_BITS
