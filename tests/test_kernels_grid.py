"""The fused read of a trained grid against the one in torch: on a GPU, and in Triton's interpreter on a CPU."""

from importlib.util import find_spec

import pytest
import torch
from helpers import interpreted
from test_full import LISTS, mobilinear

from mobiquant.calibrate import latent

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with CUDA builds of torch only")


def compare(slices, columns, group, device):
    """Weights and gradients of both ways, at every depth, with positions beyond the grid among them."""
    from mobiquant.kernels import grid

    made = latent.LatentLinear(mobilinear(slices, 37, columns, group), latent.Depth(1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.position += torch.randn(made.position.shape, generator=generator)
        made.log_scale += 0.3 * torch.randn(made.log_scale.shape, generator=generator)
        made.zero += 0.2 * torch.randn(made.zero.shape, generator=generator)
    slope = torch.randn(37, columns, generator=generator)
    fused = [p.detach().clone().to(device) for p in (made.position, made.log_scale, made.zero)]
    for depth in range(1, len(slices) + 1):
        made.depth.value = depth
        weight = made.weight(torch.float32)
        wanted = torch.autograd.grad(weight, (made.position, made.log_scale, made.zero), slope)
        cells = torch.tensor(2.0 ** (made.format.widths[depth - 1] - slices[0]), device=device)
        again = grid.read(*fused, cells, group, slices[0], torch.float32)
        assert torch.allclose(again.cpu(), weight, rtol=1e-5, atol=1e-6)
        for one, other in zip(grid.back(slope.to(device), *fused, cells, group, slices[0]), wanted, strict=True):
            # sums over a group in another order
            assert torch.allclose(one.cpu(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("slices", LISTS)
@pytest.mark.parametrize(("columns", "group"), [(40, 16), (64, 64), (576, 128), (72, 24)])
def test_on_a_gpu_it_reads_and_learns_as_torch_does(slices, columns, group):
    compare(slices, columns, group, "cuda")


@needs_triton
def test_in_the_interpreter_it_reads_and_learns_as_torch_does():
    code = "import test_kernels_grid as t\nfor s in t.LISTS:\n for c, g in ((40, 16), (72, 24)): t.compare(s, c, g, 'cpu')"
    ran = interpreted(code)
    assert ran.returncode == 0, ran.stderr[-2000:]


@needs_triton
def test_kernels_keep_the_names_of_their_module_when_annotations_are_checked():
    from mobiquant.kernels import descent, grid

    for kernel in (descent._block, descent._choose, grid._read, grid._back, grid._place):
        assert "tl" in kernel.fn.__globals__
