"""Fast paths, one file each, imported only where they can run; every one has a slow path in torch that it is tested against."""

from importlib.util import find_spec

from torch import Tensor

# columns of a block of coordinate descent; `types.h` of the CPU kernels says it too
DESCENT_COLUMNS = 64
# builds of torch without Triton (Windows) take the slow paths
TRITON = find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether work on `x` can take a Triton kernel."""
    return x.is_cuda and TRITON
