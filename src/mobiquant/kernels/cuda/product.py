"""Choice of the way a product takes on CUDA, and when none of them can be taken."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mobiquant import pack
from mobiquant import slices as s
from mobiquant.kernels.cuda import many
from mobiquant.kernels.cuda.few import DTYPES, Group
from mobiquant.kernels.cuda.tiles import Tiles, prepare, unfit

# the first with bf16 in its tensor cores
CAPABILITY = (8, 0)
# relative error of a product that is no rounding any more
WRONG = 0.02


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


def _few(x: Float[Tensor, "T K"], weight: Tiles, depth: Int[Tensor, " T"]) -> Float[Tensor, "T N"]:
    """Few tokens by a weight, token t at `depth[t]` (from 1)."""
    tau = torch.full_like(depth, float("-inf"), dtype=torch.float32)
    nowhere = torch.zeros(len(depth), len(weight.slices), dtype=torch.float64, device=x.device)
    return Group([weight], [None])(x, tau, depth, nowhere)[0]


@cache
def failing(slices: tuple[int, ...], group_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels of a format are not to be used on a device, in words; empty where a small product comes out right.

    Made once, when a format is first met: a compiler, a driver or a GPU that nobody has tried must not give wrong answers.
    """
    rows, columns, total = 48, 192, sum(slices)
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 2**total, (rows, columns), generator=generator).to(torch.uint8)
    shape = rows, s.groups(columns, group_size)
    scale = (torch.rand(shape, generator=generator) + 0.5).half()
    zero = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    x = torch.randn(3, columns, generator=generator).to(dtype)
    try:
        with torch.inference_mode(False), torch.no_grad():
            planes = [plane.to(device) for plane in pack.pack(code, slices)]
            laid = prepare(planes, scale.to(device), zero.to(device), slices, group_size, columns)
            for depth in (1, len(slices)):
                wanted = x.float() @ s.read(code, scale, zero, slices, group_size, depth).T
                every = torch.full((3,), depth, device=device)
                own = x.to(device)
                # every way, whichever this shape would take
                ways = [_few(own, laid, every), *many.dense(own, [laid], depth)]
                if many.has_warpgroups(device):
                    # in a tile of few tokens, in one that is more than half full, and in one of most
                    for split in (1, 2):
                        thirty = many.fused(own.repeat(30, 1), [laid], every.repeat(30), split)
                        ways += [*many.fused(own, [laid], every, split), thirty[0].unflatten(0, (30, 3))]
                    ways += [made[:3] for made in many.fused(own.repeat(60, 1), [laid], depth, own=256)]
                for made in ways:
                    error = (made.float().cpu() - wanted).norm() / wanted.expand(made.shape).norm()
                    if not error < WRONG:
                        return f"the GPU kernels give wrong products on this device (error {float(error):.2g})"
    # whatever the driver or the compiler says: the reason is told, and torch takes over
    except (RuntimeError, OSError, ImportError) as error:
        return f"the GPU kernels do not run on this device ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return ""


def usable(x: Float[Tensor, "T K"], slices: tuple[int, ...], group_size: int, columns: int) -> bool:
    """Whether kernels can take a product; the first time they cannot for a reason that matters, a warning names it.

    Other devices, fp32 activations and gradients are not for them, without a word.
    """
    if not x.is_cuda or x.dtype not in DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    device = torch.device("cuda", x.device.index or 0)
    reason = missing(device.index) or unfit(slices, group_size, columns) or failing(slices, group_size, x.dtype, device)
    if reason:
        _warn(reason)
    return not reason
