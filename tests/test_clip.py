"""Ranges: the searched one is the best of its candidates, and good for every depth."""

import pytest
import torch
from helpers import KINDS, SLICES, normal, slice_lists, snr_db, weights
from hypothesis import given
from hypothesis import strategies as st

from mobiquant import clip, config
from mobiquant import slices as s


def group_costs(weight, importance, scale, zero, slices, group, depth_weights):
    """`sum_e lam_e sum_k h_k (read(q, e) - W)^2` of each group [N, G], fp64, from what is really read."""
    code = s.encode(weight, scale, zero, slices, group)
    error = torch.zeros(weight.shape, dtype=torch.float64)
    for depth, lam in enumerate(depth_weights, 1):
        error += lam * (s.read(code, scale, zero, slices, group, depth).double() - weight.double()) ** 2
    error *= importance.double()
    return torch.stack([part.sum(1) for part in error.split(group, dim=1)], 1)


@given(
    slice_lists(), st.sampled_from(KINDS), st.sampled_from([5, 8, 16]), st.integers(1, 40), st.booleans(), st.integers(0, 10**6)
)
def test_search_is_the_best_of_its_ratios(slices, kind, group, columns, even, seed):
    weight, importance = weights(kind, 4, columns, seed), normal(columns, seed=seed).square() + 0.01
    lam = (1.0,) * len(slices) if even else config.default_depth_weights(slices)
    found = clip.search(weight, importance, slices, group, lam)
    cost = group_costs(weight, importance, *found, slices, group, lam)
    candidates = [clip.min_max(weight, slices, group, ratio) for ratio in clip.RATIOS]
    best = torch.stack([group_costs(weight, importance, *c, slices, group, lam) for c in candidates]).amin(0)
    # errors far below a step are rounding noise of fp32
    noise = (found[0].double() * 1e-5) ** 2 * group * sum(lam) * importance.max()
    assert (cost <= best * (1 + 1e-3) + noise).all()


@pytest.mark.parametrize("slices", SLICES)
def test_search_improves_on_the_full_range(slices):
    weight, importance = normal(16, 136, seed=1), normal(136, seed=2).square() + 0.1
    lam = config.default_depth_weights(slices)
    full = group_costs(weight, importance, *clip.min_max(weight, slices, 64), slices, 64, lam)
    found = group_costs(weight, importance, *clip.search(weight, importance, slices, 64, lam), slices, 64, lam)
    assert found.shape == (16, 3)
    assert (found <= full * (1 + 1e-4)).all()
    # at 7 bits the cell is too fine for clipping to pay
    if slices[0] < 4:
        assert found.sum() < 0.95 * full.sum()


@pytest.mark.parametrize("slices", [x for x in SLICES if sum(x) == 8 and x[0] in (2, 3)])
def test_a_range_for_the_base_alone_ruins_all_bits(slices):
    weight, importance = normal(32, 256, seed=1), torch.ones(256)
    alone = (1.0,) + (0.0,) * (len(slices) - 1)
    db = []
    for lam in (alone, config.default_depth_weights(slices)):
        scale, zero = clip.search(weight, importance, slices, 64, lam)
        code = s.encode(weight, scale, zero, slices, 64)
        db.append([snr_db(weight, s.read(code, scale, zero, slices, 64, d)) for d in (1, len(slices))])
    assert db[0][0] >= db[1][0]
    assert db[1][1] > db[0][1] + 10
    assert db[1][1] > 35


def test_importance_decides():
    weight = torch.full((1, 16), 0.01)
    weight[0, 0], weight[0, 1:8] = 1.0, torch.linspace(-0.9, 0.5, 7)
    plain = clip.search(weight, torch.ones(16), (2, 2), 16, (1.0, 1.0))
    important = torch.ones(16)
    important[0] = 1e4
    kept = clip.search(weight, important, (2, 2), 16, (1.0, 1.0))
    error = [abs(s.read(s.encode(weight, *r, (2, 2), 16), *r, (2, 2), 16, 2)[0, 0] - 1).item() for r in (plain, kept)]
    assert error[1] < error[0]


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_min_max_takes_a_share_of_the_range(ratio):
    # whole multiples of the step, so that nothing is rounded
    weight = torch.tensor([[-2.0, 1.0, 0.5, 4.0, 8.0, 0.25, 16.0, -8.0, 3.0, 6.0]])
    scale, zero = clip.min_max(weight, (2, 2), 4, ratio)
    low, high = torch.tensor([-2.0, -8.0, 0.0]), torch.tensor([4.0, 16.0, 6.0])
    step = ratio * (high - low) / 3
    assert torch.allclose(scale[0].float(), step, rtol=1e-3)
    assert torch.allclose(s.load_zero(zero, (2, 2))[0], -low * ratio / step, atol=2**-6)


@pytest.mark.parametrize("kind", ["zero", "constant", "negative constant"])
@pytest.mark.parametrize("slices", SLICES)
def test_constant_groups(kind, slices):
    weight, lam = weights(kind, 3, 20), config.default_depth_weights(slices)
    scale, zero = clip.search(weight, torch.ones(20), slices, 8, lam)
    assert scale.shape == (3, 3) and scale.isfinite().all() and (scale > 0).all()
    code = s.encode(weight, scale, zero, slices, 8)
    error = s.read(code, scale, zero, slices, 8, len(slices)) - weight
    assert error.abs().max() <= 0.3 * 2.0 ** (1 - sum(slices)) + s.MIN_SCALE


@pytest.mark.parametrize("how, fill, expected", [("amin", 9.0, [0, 4]), ("amax", -9.0, [3, 5]), ("sum", 0.0, [6, 9])])
def test_reduce_with_a_short_last_group(how, fill, expected):
    assert clip.group_reduce(torch.arange(6.0)[None], 4, how, fill).tolist() == [expected]


def test_importance_of_another_length_is_refused():
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        clip.search(normal(4, 16), torch.ones(15), (2, 2), 8, (1.0, 1.0))
    with pytest.raises(ValueError):
        clip.search(normal(4, 16), torch.ones(16), (2, 2), 8, (1.0,))


@pytest.mark.parametrize("at_once", [1, 100, 359])
def test_pieces_give_what_the_whole_gives(monkeypatch, at_once):
    weight, settings = normal(9, 40, seed=1), (normal(40, seed=2).square(), (2, 1, 1), 16, (1.0, 3.0, 9.0))
    whole = clip.search(weight, *settings)
    monkeypatch.setattr(clip, "IN_CACHE", at_once)
    assert all(torch.equal(one, other) for one, other in zip(clip.search(weight, *settings), whole, strict=True))
