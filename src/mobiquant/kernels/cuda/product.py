"""Choice of the way a product takes on CUDA, and when none of them can be taken."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mobiquant.kernels.cuda import many
from mobiquant.kernels.cuda.few import DTYPES, MOST, Group
from mobiquant.kernels.cuda.tiles import Tiles, unfit

# the first with bf16 in its tensor cores
CAPABILITY = (8, 0)


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"mobiquant: {reason}; layers take the slow path in torch", stacklevel=4)


@cache
def missing(device: int) -> str:
    """Why kernels cannot be compiled or run on a device, in words; empty where they can."""
    if torch.version.hip:
        return "the GPU kernels are for CUDA, this is a build of torch for ROCm"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "the GPU kernels need the package cuda-bindings, install it with pip"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the GPU kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    return ""


def usable(x: Float[Tensor, "T K"], slices: tuple[int, ...], group_size: int, columns: int) -> bool:
    """Whether kernels can take a product; the first time they cannot for a reason that matters, a warning names it.

    Other devices, fp32 activations and gradients are not for them, without a word.
    """
    if not x.is_cuda or x.dtype not in DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    reason = missing(x.device.index or 0) or unfit(slices, group_size, columns)
    if reason:
        _warn(reason)
    return not reason


def product(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`x` [T, K] in fp16 or bf16 by a weight in tiles, token t at `depth[t]` (from 1) or all at one depth."""
    tokens = x.shape[0]
    if tokens > MOST:
        return many.product(x, weight, depth)
    group = Group([weight], [None], None)
    if tokens > group.most():
        return many.product(x, weight, depth)
    entries = 1 if isinstance(depth, int) else tokens
    tau = torch.full((entries,), float("-inf"), device=x.device)
    cap = torch.full((1,), depth, device=x.device) if isinstance(depth, int) else depth.long()
    nowhere = torch.zeros(max(entries, 1), len(weight.slices), dtype=torch.float64, device=x.device)
    return group(x, tau, cap, nowhere)[0]
