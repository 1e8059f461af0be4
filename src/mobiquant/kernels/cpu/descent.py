"""One block of columns of `compensate.descend` in one call of the C++ kernels; the counterpart of `kernels.descent` on a CPU.

In torch the same work is some fifteen small operations a column, each of which costs more to start than to do.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mobiquant.kernels import DESCENT_COLUMNS
from mobiquant.kernels.cpu import library


def usable(x: Tensor) -> bool:
    """Whether work on `x` can take this path; layers warn where the kernels were not built."""
    return x.device.type == "cpu" and library.available()


def block(
    gradient: Tensor, hessian: Tensor, chosen: Tensor, scale: Tensor, diagonal: Tensor, weights: Tensor, tails: Tensor,
    widths: Sequence[int], base: int, search_bits: int, start: int, stop: int,
) -> Tensor:  # fmt: skip
    """Choose the codes of the columns `start` to `stop`, B <= 64 of them, anew, in place in `chosen` uint8 [K, N].

    Shapes: gradient [E, B, N], hessian [E, K, K], scale [K, N], diagonal and weights [K, E], tails [K, E - coarse, E], all
    contiguous fp32. Returns by how much the weights moved, [E, B, N].
    """
    found, (columns, rows), moved = library.load(), chosen.shape, torch.empty_like(gradient)
    held = (gradient, hessian, scale, diagonal, weights, tails, chosen, moved)
    assert found is not None and gradient.shape[1] == stop - start <= DESCENT_COLUMNS
    assert all(one.is_contiguous() for one in held)
    work = library.Descent(
        *(one.data_ptr() for one in held), (library.integer * library.MAX_BITS)(*widths),
        len(widths), columns, rows, base, search_bits, start, stop,
    )  # fmt: skip
    found.mobiquant_descend(ctypes.byref(work), library.threads())
    return moved
