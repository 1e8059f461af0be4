"""The fused descent on a GPU against the one in torch."""

import pytest
import torch
from test_compensate import objective, start

from mobiquant import compensate

LISTS = [(2, 1, 1, 2, 2), (2, 2, 2, 2), (2, 2), (4, 4), (3, 3, 2), (2, 1, 1, 1, 1, 1, 1), (7, 1), (1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("slices", LISTS)
@pytest.mark.parametrize("rows", [12, 70])
def test_codes_are_those_of_the_slow_path(slices, rows):
    weight, x, code, grid, problem = start(slices, rows=rows, spread=True)
    slow = compensate.descend(code, grid, problem, 2)
    there = compensate.Grid(grid.scale.cuda(), grid.zero.cuda(), slices, grid.group_size)
    moved = compensate.Problem(problem.hessian.cuda(), problem.cross.cuda(), problem.depth_weights)
    fast = compensate.descend(code.cuda(), there, moved, 2).cpu()
    # sums in another order may tip a tie, and what follows it
    assert (fast != slow).float().mean() < 0.02
    assert objective(fast, grid, problem, weight, x) <= objective(slow, grid, problem, weight, x) * 1.001


@pytest.mark.gpu
def test_same_codes_every_time():
    _, _, code, grid, problem = start((2, 1, 1, 2, 2), rows=300)
    there = compensate.Grid(grid.scale.cuda(), grid.zero.cuda(), grid.slices, grid.group_size)
    moved = compensate.Problem(problem.hessian.cuda(), problem.cross.cuda(), problem.depth_weights)
    first, again = (compensate.descend(code.cuda(), there, moved, 2) for _ in range(2))
    assert torch.equal(first, again)
