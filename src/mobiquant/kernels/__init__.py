"""Fast paths, one file each, imported only where they can run; every one has a slow path in torch that it is tested against."""

from importlib.util import find_spec

from torch import Tensor

# builds of torch without Triton (Windows) take the slow paths
TRITON = find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether work on `x` can take a Triton kernel."""
    return x.is_cuda and TRITON
