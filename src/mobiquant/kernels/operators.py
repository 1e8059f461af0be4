"""Kernels as operators of torch, which a compiled block calls as they are; their files are imported when they first run."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("mobiquant::read_grid", mutates_args=(), device_types="cuda")
def read_grid(
    position: Tensor, log_scale: Tensor, zero: Tensor, cells: Tensor, group_size: int, base: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Weights of `dtype`, [N, K] as `position`, by one kernel (`kernels.grid`); an operator, so that blocks can be compiled."""
    from mobiquant.kernels import grid

    return grid.read(position, log_scale, zero, cells, group_size, base, dtype)


@torch.library.custom_op("mobiquant::read_grid_backward", mutates_args=(), device_types="cuda")
def read_grid_backward(
    slope: Tensor, position: Tensor, log_scale: Tensor, zero: Tensor, cells: Tensor, group_size: int, base: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by position, logarithm of the scale and zero point."""
    from mobiquant.kernels import grid

    return grid.back(slope, position, log_scale, zero, cells, group_size, base)


@read_grid.register_fake
def _(position: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(position, dtype=others[-1])


@read_grid_backward.register_fake
def _(slope: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(one) for one in others[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:6]


def _return(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    return *read_grid_backward(slope, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


read_grid.register_autograd(_return, setup_context=_keep)
