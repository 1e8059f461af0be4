"""The fused descents, on a CPU with every instruction set of this machine and on a GPU, against the one in torch."""

import pytest
import torch
from test_compensate import objective, start

from mobiquant import compensate
from mobiquant.kernels.cpu import library

LISTS = [(2, 1, 1, 2, 2), (2, 2, 2, 2), (2, 2), (4, 4), (3, 3, 2), (2, 1, 1, 1, 1, 1, 1), (7, 1), (1, 1)]
SETS = library.instructions()
on_cpu = pytest.mark.skipif(not SETS, reason="the CPU kernels are not built: no C++ compiler")


@pytest.fixture
def slow(monkeypatch):
    """A descent by torch operators."""

    def descend(*given):
        with monkeypatch.context() as patch:
            patch.setattr(compensate, "_fused", lambda code: None)
            return compensate.descend(*given)

    return descend


def on_gpu(code, grid, problem):
    there = compensate.Grid(grid.scale.cuda(), grid.zero.cuda(), grid.slices, grid.group_size)
    return code.cuda(), there, compensate.Problem(problem.hessian.cuda(), problem.cross.cuda(), problem.depth_weights)


def check_near(fast, slow, code, grid, problem, weight, x):
    # sums in another order may tip a tie, and what follows it
    assert (fast != slow).float().mean() < 0.02
    assert objective(fast, grid, problem, weight, x) <= objective(slow, grid, problem, weight, x) * 1.001
    # the descent moves a good part of the codes, so that equal ones say something
    assert grid.slices[0] > 6 or (slow != code).float().mean() > 0.1


@on_cpu
@pytest.mark.parametrize("slices", [*LISTS, (8,), (1,) * 8])
@pytest.mark.parametrize("rows, columns", [(1, 70), (12, 88), (70, 200)])
def test_codes_on_a_cpu_are_those_of_the_slow_path(slow, instructions, slices, rows, columns):
    if slices[0] > compensate.SEARCH_BITS:
        # over many columns ties decide; tests/native/check.cpp compares with the definition in double
        rows, columns = min(rows, 12), min(columns, 88)
    for spread in (False, True):
        weight, x, code, grid, problem = start(slices, rows, columns, spread=spread)
        fast = compensate.descend(code, grid, problem, 2)
        check_near(fast, slow(code, grid, problem, 2), code, grid, problem, weight, x)


@pytest.mark.gpu
@pytest.mark.parametrize("slices", LISTS)
@pytest.mark.parametrize("rows", [12, 70])
def test_codes_on_a_gpu_are_those_of_the_slow_path(slow, slices, rows):
    weight, x, code, grid, problem = start(slices, rows=rows, spread=True)
    fast = compensate.descend(*on_gpu(code, grid, problem), 2).cpu()
    check_near(fast, slow(code, grid, problem, 2), code, grid, problem, weight, x)


@pytest.mark.gpu
def test_same_codes_every_time_on_a_gpu():
    given = on_gpu(*start((2, 1, 1, 2, 2), rows=300)[2:])
    first, again = (compensate.descend(*given, 2) for _ in range(2))
    assert torch.equal(first, again)


@on_cpu
def test_the_number_of_threads_changes_no_code(instructions, monkeypatch):
    given, found = start((2, 1, 1, 2, 2), rows=300, spread=True)[2:], []
    for count in (1, 2, 5, 1):
        # not those of torch, whose products may be summed otherwise
        monkeypatch.setattr(library, "threads", lambda count=count: count)
        found.append(compensate.descend(*given, 2))
    assert all(torch.equal(one, found[0]) for one in found[1:])


@on_cpu
@pytest.mark.parametrize("begin, stop", [(0, 64), (64, 88)])
def test_a_block_moves_what_it_says_and_no_other_column(instructions, begin, stop):
    _, _, code, grid, problem = start((2, 1, 1, 2, 2), rows=21, spread=True)
    work = compensate._Work(code, grid, problem)
    work.block(begin, stop)
    chosen = work.chosen.T.contiguous()
    assert torch.equal(chosen[:, :begin], code[:, :begin]) and torch.equal(chosen[:, stop:], code[:, stop:])
    assert (chosen != code).float().mean() > 0.01
    assert torch.allclose(work.reads, grid.read(chosen).mT, rtol=1e-5, atol=1e-7)


@on_cpu
def test_a_row_that_is_not_finite_stays_alone(instructions):
    _, _, code, grid, problem = start((2, 1, 1, 2, 2), rows=40)
    whole = compensate.descend(code, grid, problem, 1)
    for bad in (float("nan"), float("inf")):
        cross = problem.cross.clone()
        cross[:, 7] = bad
        broken = compensate.descend(code, grid, compensate.Problem(problem.hessian, cross, problem.depth_weights), 1)
        others = torch.arange(40) != 7
        assert torch.equal(broken[others], whole[others])


@on_cpu
def test_without_the_library_codes_are_found_by_torch(slow, monkeypatch):
    given = start((2, 1, 1, 2, 2))[2:]
    monkeypatch.setattr(library, "load", lambda: None)
    assert torch.equal(compensate.descend(*given, 1), slow(*given, 1))
