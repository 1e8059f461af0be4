"""Coordinate descent over nested codes: never worse, exact where it is searched, better in output at every depth."""

import itertools

import pytest
import torch
from helpers import SLICES, generator, normal, slice_lists, snr_db
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiquant import clip, compensate, config
from mobiquant import slices as s
from mobiquant.compensate import Chooser, Grid, Problem, descend
from mobiquant.kernels.cpu import library


@pytest.fixture(params=["torch", "kernel"], autouse=True)
def way(request, monkeypatch):
    """How blocks of columns are done: by torch operators, and by the kernels where there are any."""
    if request.param == "torch":
        monkeypatch.setattr(compensate, "_fused", lambda code: None)
    elif not library.available():
        pytest.skip("the CPU kernels are not built: no C++ compiler")


SHORT = [x for x in SLICES if sum(x) <= 6] + [(2, 1, 1), (3, 3), (1, 2, 1, 2), (4, 1, 1)]


def correlated(columns, tokens=512, seed=0):
    """[K, T] inputs in which a few directions hold most of the energy."""
    decay = 0.9 ** torch.arange(columns)
    mix = normal(columns, columns, seed=seed) * decay @ normal(columns, columns, seed=seed + 1) / columns
    return (mix + 0.05 * torch.eye(columns)) @ normal(columns, tokens, seed=seed + 2)


def start(slices, rows=12, columns=88, group=32, seed=0, spread=False):
    """(weight, inputs, rounded codes, grid, problem); `spread` gives each depth inputs of its own."""
    weight, x = normal(rows, columns, seed=seed + 3) * 0.05, correlated(columns, seed=seed)
    lam = config.default_depth_weights(slices)
    read_by = [x + spread * 0.1 * normal(*x.shape, seed=seed + 7 + e) for e in range(len(slices) if spread else 1)]
    hessian = torch.stack([xe @ xe.T for xe in read_by]) / x.shape[1]
    cross = torch.stack([weight @ x @ xe.T for xe in read_by]) / x.shape[1]
    scale, zero = clip.search(weight, hessian[0].diagonal(), slices, group, lam)
    grid = Grid(scale, zero, slices, group)
    return weight, x, s.encode(weight, scale, zero, slices, group), grid, Problem(hessian, cross, lam)


def objective(code, grid, problem, weight, x):
    """The sum of section "What" with its constant, so that values are comparable and positive."""
    constant = ((weight.double() @ x.double()) ** 2).sum() / x.shape[1] * sum(problem.depth_weights)
    return (problem.objective(grid.read(code)) + constant).item()


@settings(max_examples=30)
@given(slice_lists(most=4), st.sampled_from([5, 64, 70]), st.booleans(), st.integers(0, 10**6))
def test_up_to_4_bits_nothing_rises(slices, columns, spread, seed):
    weight, x, code, grid, problem = start(slices, 4, columns, 16, seed, spread)
    # also from codes that are far from any minimum
    random = torch.randint(0, 2 ** sum(slices), code.shape, dtype=torch.uint8, generator=generator(seed))
    for first in (code, random):
        values = [objective(first, grid, problem, weight, x)]
        values += [objective(descend(first, grid, problem, n), grid, problem, weight, x) for n in (1, 2, 3)]
        for before, after in itertools.pairwise(values):
            assert after <= before * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("slices", SLICES)
def test_objective_falls_on_correlated_inputs(slices):
    weight, x, code, grid, problem = start(slices)
    first = objective(code, grid, problem, weight, x)
    once = objective(descend(code, grid, problem, 1), grid, problem, weight, x)
    twice = objective(descend(code, grid, problem, 2), grid, problem, weight, x)
    assert once < 0.6 * first
    assert twice < once


@pytest.mark.parametrize("slices", SLICES)
def test_output_beats_rounding_at_every_depth(slices):
    weight, x, code, grid, problem = start(slices)
    y = weight @ x
    rounded, chosen = ([snr_db(y, w @ x) for w in grid.read(c)] for c in (code, descend(code, grid, problem, 1)))
    for width, before, after in zip(s.bounds(slices), rounded, chosen, strict=True):
        # the finest depths pay for the coarse ones, as the sum over depths asks
        assert after > before + (1.5 if width <= 5 else 0 if width == 6 else -6)


@pytest.mark.parametrize("slices", SHORT)
def test_objective_is_the_output_error(slices):
    weight, x, code, grid, problem = start(slices)
    errors = ((grid.read(code).double() - weight.double()) @ x.double()) ** 2
    lam = torch.tensor(problem.depth_weights, dtype=torch.float64)
    direct = ((errors.sum((1, 2)) / x.shape[1]) * lam).sum().item()
    assert abs(objective(code, grid, problem, weight, x) / direct - 1) < 1e-4


def costs_and_choice(slices, seed):
    """(cost of every code [N, 2^B], cost of the chosen one [N]) for random targets and weights."""
    depths, total = len(slices), sum(slices)
    target = normal(depths, 40, seed=seed) * 2 ** slices[0] * 0.4 + 2 ** slices[0] / 2
    weight = normal(depths, 1, seed=seed + 1).exp()
    codes = torch.arange(2**total, dtype=torch.uint8)
    levels = torch.stack([s.level(s.prefix(codes, slices, d), slices, d) for d in range(1, depths + 1)])
    costs = ((target[:, :, None] - levels[:, None]) ** 2 * weight[:, :, None]).sum(0)
    return costs, costs.gather(1, Chooser(slices, weight.T)(target, 0)[:, None])[:, 0]


@given(slice_lists(most=4), st.integers(0, 10**6))
def test_chooser_equals_brute_force_as_far_as_it_searches(slices, seed):
    costs, chosen = costs_and_choice(slices, seed)
    # two codes may be equally near
    assert torch.allclose(chosen, costs.amin(1), rtol=1e-4, atol=1e-5 * 4 ** slices[0])


@given(slice_lists(), st.integers(0, 10**6))
def test_chooser_is_near_brute_force_beyond(slices, seed):
    costs, chosen = costs_and_choice(slices, seed)
    assert chosen.sum() <= costs.amin(1).sum() * 1.02


@given(slice_lists(), st.integers(0, 10**6))
def test_chooser_finds_targets_that_lie_on_a_code(slices, seed):
    codes = torch.randint(0, 2 ** sum(slices), (30,), dtype=torch.uint8, generator=generator(seed))
    levels = [s.level(s.prefix(codes, slices, d), slices, d) for d in range(1, len(slices) + 1)]
    assert torch.equal(Chooser(slices, torch.ones(1, len(slices)))(torch.stack(levels), 0), codes.long())


@pytest.mark.parametrize("slices", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (3, 3, 2), (7, 1)])
def test_bits_beyond_the_search_follow_the_last_target(slices):
    depths = len(slices)
    chooser = Chooser(slices, torch.ones(1, depths))
    target = (torch.rand(200, generator=generator(1)) * 2 ** slices[0]).expand(depths, -1)
    chosen = chooser(target, 0)
    # one target for all depths: the nearest code is the cell it lies in
    cell = (target[0] * 2 ** (sum(slices) - slices[0])).floor().long()
    prefix = cell >> (sum(slices) - chooser.search_bits)
    same = chosen >> (sum(slices) - chooser.search_bits) == prefix
    assert same.float().mean() > 0.9
    assert torch.equal(chosen[same], cell[same])
    assert chosen.min() >= 0 and chosen.max() < 2 ** sum(slices)


@pytest.mark.parametrize("slices", [(2, 2), (2, 1, 1, 2, 2)])
def test_every_depth_may_have_its_own_inputs(slices):
    _, _, code, grid, problem = start(slices, spread=True)
    assert problem.hessian.shape[0] == len(slices)
    before, after = (problem.objective(grid.read(c)) for c in (code, descend(code, grid, problem, 2)))
    assert after < before
    shared = Problem(problem.hessian[:1], problem.cross[:1], problem.depth_weights)
    copied = Problem(shared.hessian.repeat(len(slices), 1, 1), shared.cross.repeat(len(slices), 1, 1), problem.depth_weights)
    assert torch.equal(descend(code, grid, shared, 1), descend(code, grid, copied, 1))
    assert not torch.equal(descend(code, grid, shared, 1), descend(code, grid, problem, 1))


@pytest.mark.parametrize("rows", [1, 12])
def test_same_codes_every_time_and_inputs_untouched(rows):
    _, _, code, grid, problem = start((2, 1, 1, 2, 2), rows)
    kept, hessian, cross = code.clone(), problem.hessian.clone(), problem.cross.clone()
    first, again = descend(code, grid, problem, 2), descend(code, grid, problem, 2)
    assert torch.equal(first, again) and first.dtype == torch.uint8 and first.is_contiguous()
    assert torch.equal(code, kept) and torch.equal(problem.hessian, hessian) and torch.equal(problem.cross, cross)
    assert torch.equal(descend(code, grid, problem, 0), code)


@pytest.mark.parametrize("slices", [(2, 2), (2, 1, 1, 2, 2), (7, 1)])
def test_inactive_features_keep_rounded_codes(slices):
    weight, x, code, grid, problem = start(slices)
    x[[0, 9, 70]] = 0
    hessian = (x @ x.T / x.shape[1])[None]
    problem = Problem(hessian, weight @ hessian, problem.depth_weights)
    chosen = descend(code, grid, problem, 2)
    assert torch.equal(chosen[:, [0, 9, 70]], code[:, [0, 9, 70]])
    assert grid.read(chosen).isfinite().all()
    assert objective(chosen, grid, problem, weight, x) < objective(code, grid, problem, weight, x)


@pytest.mark.parametrize("slices", SLICES)
def test_no_active_feature_at_all(slices):
    _, _, code, grid, problem = start(slices)
    nothing = Problem(torch.zeros_like(problem.hessian), torch.zeros_like(problem.cross), problem.depth_weights)
    assert torch.equal(descend(code, grid, nothing, 1), code)
