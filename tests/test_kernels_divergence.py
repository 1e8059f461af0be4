"""The fused divergence against torch: on a GPU, and in Triton's interpreter on a CPU."""

from importlib.util import find_spec

import pytest
import torch
from helpers import interpreted
from torch.nn.functional import kl_div


def compare(rows, size, device, dtype):
    """Divergence and gradient of both ways, with rows that are equal, very sure, and far apart."""
    from mobiquant.kernels.divergence import Divergence

    generator = torch.Generator().manual_seed(rows + size)
    wanted = 3 * torch.randn(rows, size, generator=generator)
    made = wanted + torch.randn(rows, size, generator=generator)
    made[0] = wanted[0]
    wanted[1, 0], made[2, size - 1] = 60.0, 40.0
    made, wanted = made.to(dtype), wanted.to(dtype)
    slope = torch.rand(rows, generator=generator)
    plain = made.double().requires_grad_()
    known = kl_div(plain.log_softmax(-1), wanted.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    known.backward(slope.double())
    there = made.to(device).requires_grad_()
    found = Divergence.apply(there, wanted.to(device))
    found.backward(slope.to(device))
    close = 1e-4 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found.cpu().double(), known, rtol=1e-4, atol=1e-5)
    assert there.grad.dtype == dtype and torch.allclose(there.grad.cpu().double(), plain.grad, rtol=close, atol=close * 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "size"), [(5, 49152), (3, 4096), (4, 1000), (7, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_that_of_torch(rows, size, dtype):
    compare(rows, size, "cuda", dtype)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with CUDA builds of torch only")
def test_in_the_interpreter_it_is_that_of_torch():
    code = "import test_kernels_divergence as t\nfor size in (1000, 4097): t.compare(3, size, 'cpu', t.torch.float32)"
    ran = interpreted(code)
    assert ran.returncode == 0, ran.stderr[-2000:]
