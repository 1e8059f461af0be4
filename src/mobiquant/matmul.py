"""The mixed-depth product: every token reads as many slices of the weight as its depth says.

What: `y_t = x_t read(q, depth_t)^T + bias`. `reference` is the definition in fp32, unpacked and summed plainly; every faster
path is tested only against it. `matmul` is what layers call; it picks a backend.

Backends: C++ on a CPU (`kernels/cpu`, int8 activations) and CUDA (`kernels/cuda`) for inference, else torch operators, which
are exact in the dtype of the activations. `exact` keeps to the latter, for calibration and for comparing. Weights that the CUDA
kernels read lie in a layout of their own, which layers keep (`linear`).

How the torch path works: tokens are gathered by depth, the weight is read once for each depth that occurs, and each group
of tokens is a dense product in the dtype of the activations. Only the planes that the deepest token of the call needs are
unpacked; shallower depths are shifts of the same codes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from mobiquant import pack
from mobiquant import slices as s


@dataclass(frozen=True)
class Packed:
    """One stored weight matrix [N, K]: slice planes with scales and zero points [N, G]."""

    planes: Sequence[UInt8[Tensor, "_ N K8"]]
    scale: Float16[Tensor, "N G"]
    zero: UInt8[Tensor, "N G"]
    slices: tuple[int, ...]
    group_size: int
    columns: int

    def read(self, depth: int) -> Float[Tensor, "N K"]:
        """fp32 weights at a depth; touches the planes of that depth only."""
        code = pack.unpack(self.planes[:depth], self.columns)
        return s.dequantize(code, self.scale, self.zero, self.slices, self.group_size, depth)


def reference(x: Float[Tensor, "T K"], weight: Packed, depth: Int[Tensor, " T"]) -> Float[Tensor, "T N"]:
    """The product in fp32, every depth computed for every token and one of them kept."""
    every = torch.stack([x.float() @ weight.read(d).T for d in range(1, len(weight.slices) + 1)])  # [E, T, N]
    return every[depth.long() - 1, torch.arange(x.shape[0], device=x.device)]


_only_exact = False


@contextmanager
def exact() -> Iterator[None]:
    """Keep to torch operators inside, whatever backends there are."""
    global _only_exact
    before, _only_exact = _only_exact, True
    try:
        yield
    finally:
        _only_exact = before


def is_exact() -> bool:
    """Whether `exact` is in force."""
    return _only_exact


def gpu(x: Tensor) -> bool:
    """Whether what is on the device of `x` may take CUDA kernels."""
    return x.is_cuda and not _only_exact


def on_gpu(x: Float[Tensor, "T K"], slices: tuple[int, ...], group_size: int, columns: int) -> bool:
    """Whether the CUDA kernels take a product; layers then hold their weight as those read it (`linear`)."""
    if not gpu(x):
        return False
    from mobiquant.kernels.cuda.product import usable

    return usable(x, slices, group_size, columns)


@lru_cache(maxsize=32)
def _widths(slices: tuple[int, ...]) -> Int[Tensor, " E"]:
    return torch.tensor(s.bounds(slices), dtype=torch.int8)


def matmul(x: Float[Tensor, "T K"], weight: Packed, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """The product in the dtype of `x`; `depth` is one for all tokens or one for each."""
    if not _only_exact and x.device.type == "cpu":
        from mobiquant.kernels.cpu.product import product, usable

        if usable(x, weight.group_size, weight.columns):
            widths = _widths(weight.slices)
            one = isinstance(depth, int)
            bits = widths[depth - 1].expand(x.shape[0]) if one else widths[depth - 1]
            few = weight.planes[:depth] if one else weight.planes
            return product(x, list(few), weight.scale, weight.zero, bits, weight.slices[0], weight.group_size, weight.columns)
    return dense(x, weight, depth)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with `x`: its own, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def dense(x: Float[Tensor, "T K"], weight: Packed, depth: Int[Tensor, " T"] | int) -> Float[Tensor, "T N"]:
    """`matmul` by torch operators."""
    if isinstance(depth, int):
        return x @ weight.read(depth).to(x.dtype).T
    present = torch.unique(depth).tolist()
    if len(present) == 1:
        return x @ weight.read(present[0]).to(x.dtype).T
    y = x.new_empty(x.shape[0], weight.scale.shape[0], dtype=product_dtype(x))
    if not present:
        return y
    deepest = present[-1]
    code = pack.unpack(weight.planes[:deepest], weight.columns)
    kept = weight.slices[:deepest]
    for d in present:
        w = s.read(code, weight.scale, weight.zero, kept, weight.group_size, d).to(x.dtype)
        tokens = (depth == d).nonzero()[:, 0]
        y[tokens] = x[tokens] @ w.T
    return y
