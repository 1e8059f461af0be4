"""Master codes [N, K] <-> slice planes, the form in which weights are stored and held in memory.

What: slice `e` of width `b_e` is `b_e` bit planes of eight columns a byte, `planes[e]: uint8 [b_e, N, ceil(K / 8)]`, most
significant bit first in both directions. A reader that wants the first `d` slices touches `planes[:d]` and nothing else.

Choice: bit planes rather than bit fields, because every slice list then has the same bytes ((2, 2) and (2, 1, 1) differ
only in where the tensors are cut) and widths of 3, 5, 6 or 7 bits need no special case. The layouts that kernels want are
made from this one after loading.

Trade-off: unpacking costs one table look-up for each eight bits. The table maps a byte to eight bytes of one bit, handled
as one int64, so that planes are merged eight codes at a time.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import UInt8
from torch import Tensor


def plane_shape(rows: int, columns: int, width: int) -> tuple[int, int, int]:
    """Shape of the stored planes of one slice: [b_e, N, ceil(K / 8)]."""
    return width, rows, -(-columns // 8)


def pack(code: UInt8[Tensor, "N K"], slices: tuple[int, ...]) -> list[UInt8[Tensor, "_ N K8"]]:
    """[N, K] master codes -> the planes of each slice."""
    total = sum(slices)
    padded = torch.nn.functional.pad(code, (0, -code.shape[1] % 8))
    octets = padded.view(code.shape[0], -1, 8)  # [N, ceil(K/8), 8]
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=code.device)
    bits = [(((octets >> (total - 1 - i)) & 1) * place).sum(-1, dtype=torch.uint8) for i in range(total)]
    planes, start = [], 0
    for width in slices:
        planes.append(torch.stack(bits[start : start + width]))
        start += width
    return planes


@lru_cache(maxsize=8)
def _spread_table(device: torch.device) -> Tensor:
    """[256] int64: byte -> its eight bits, one in each byte of the int64, first column in the lowest address."""
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return ((byte & place) != 0).to(torch.uint8).view(torch.int64).flatten().to(device)


def unpack(planes: Sequence[UInt8[Tensor, "_ N K8"]], columns: int) -> UInt8[Tensor, "N K"]:
    """Planes of the first slices -> [N, K] prefix codes at that depth; no other slice is touched."""
    table = _spread_table(planes[0].device)
    _, rows, octets = planes[0].shape
    # [N * ceil(K/8)] int64, eight codes in each; codes have at most 8 bits, so a shift never crosses a byte
    merged = torch.zeros(rows * octets, dtype=torch.int64, device=planes[0].device)
    for plane in planes:
        for bit in plane:
            merged = merged.bitwise_left_shift_(1).bitwise_or_(table.index_select(0, bit.flatten().int()))
    return merged.view(torch.uint8).view(rows, octets * 8)[:, :columns]
