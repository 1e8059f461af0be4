"""The mixed-depth product on a CPU as the torch operator `mobiquant::product`, with a fake implementation for `torch.compile`.

Few tokens: activations are quantised to int8 with a scale for each token and 32 columns; the weight is read bit by bit, as deep
as each token asks, and sums are whole numbers within a lane of 32 columns and fp32 across lanes. That is some 45 dB from fp32.

Many bf16 tokens of a depth, on a machine with matrix units (AMX): the weight is written out once at that depth and torch
multiplies. From `MANY` tokens on that is the faster way; in fp32 it never was (`docs/cpu.md`).
"""

import ctypes
import warnings
from functools import cache

import torch
from torch import Tensor

from mobiquant.kernels.cpu import library

ARGUMENTS = "Tensor x, Tensor[] planes, Tensor scale, Tensor zero, Tensor bits, int base, int group_size, int columns"
# registered by hand: the wrappers of `torch.library.custom_op` cost as much as a small layer
OPERATORS = torch.library.Library("mobiquant", "FRAGMENT")
OPERATORS.define(f"product({ARGUMENTS}) -> Tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY, SIZES = 192, 64


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"mobiquant: {reason}; layers take the slow path in torch", stacklevel=4)


def usable(x: Tensor, group_size: int, columns: int) -> bool:
    """Whether the operator can take a product; the first time it cannot for a reason that matters, a warning names it.

    Operands on other devices, other dtypes and gradients are not for it, without a word.
    """
    if x.device.type != "cpu" or x.dtype not in DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if not library.available():
        _warn("the CPU kernels are not built, install a C++ compiler and mobiquant again")
        return False
    if reason := library.unfit(group_size, columns):
        _warn(f"{reason}, which is what the CPU kernels read")
        return False
    return True


@cache
def matrix_units() -> bool:
    """Whether torch multiplies bf16 matrices with AMX here."""
    return torch.cpu._is_amx_tile_supported()


def _product(
    x: Tensor, planes: list[Tensor], scale: Tensor, zero: Tensor, bits: Tensor, base: int, group_size: int, columns: int
) -> Tensor:
    """`x` [T, K] by a stored weight [N, K] -> [T, N] in the dtype of `x`, token t reading `bits[t]` (int8) bits."""
    parts = [plane.contiguous() for plane in planes]
    scale, zero = scale.contiguous(), zero.contiguous()
    weight = library.weight_of(parts, scale, zero, None, base, group_size, columns)
    if x.shape[0] < MANY or x.dtype != torch.bfloat16 or not matrix_units():
        return _few(x, weight, bits)
    y, (widths, counts) = x.new_empty(x.shape[0], weight.rows), bits.unique(return_counts=True)
    for width, count in zip(widths.tolist(), counts.tolist(), strict=True):
        if count == x.shape[0]:
            return x.detach() @ read(weight, width, x.dtype).T
        tokens = (bits == width).nonzero()[:, 0]
        some = x.detach()[tokens]
        if count < MANY:
            y[tokens] = _few(some, weight, bits[tokens])
        else:
            # a product of a new size is compiled anew, and kept: few sizes are few of them
            padded = torch.nn.functional.pad(some, (0, 0, 0, -count % SIZES))
            y[tokens] = (padded @ read(weight, width, x.dtype).T)[:count]
    return y


def _few(x: Tensor, weight: library.Weight, bits: Tensor) -> Tensor:
    found, tokens = library.load(), x.shape[0]
    assert found is not None
    y, floats, held = torch.empty(tokens, weight.rows), x.detach().float().contiguous(), bits.contiguous()
    done = found.mobiquant_product(
        ctypes.byref(weight), floats.data_ptr(), tokens, held.data_ptr(), y.data_ptr(), library.threads()
    )
    if not done:
        raise MemoryError(f"no memory for {tokens} tokens of {weight.columns} columns")
    return y.to(x.dtype)


def read(weight: library.Weight, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] at `bits` in fp32 or bf16."""
    found = library.load()
    assert found is not None
    out = torch.empty(weight.rows, weight.columns, dtype=dtype)
    found.mobiquant_read(ctypes.byref(weight), bits, int(dtype == torch.bfloat16), out.data_ptr(), library.threads())
    return out


def _fake(x: Tensor, planes: list[Tensor], scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


OPERATORS.impl("product", _product, "CPU")
torch.library.register_fake("mobiquant::product", _fake, lib=OPERATORS)
product = torch.ops.mobiquant.product.default
