"""Routers: ordered scores, depths that follow a threshold, int8 storage."""

import math

import pytest
import torch
from helpers import normal, random_router, snr_db
from hypothesis import given
from hypothesis import strategies as st

from mobiquant import router

COLUMNS, HIDDEN, OUTPUTS = 48, 8, 4


def case(seed=0, tokens=200):
    """Tokens of very different sizes and a router."""
    size = torch.logspace(-3, 3, tokens)[:, None]
    return normal(tokens, COLUMNS, seed=seed) * size, random_router(COLUMNS, HIDDEN, OUTPUTS, seed)


def depths(score, tau, cap=OUTPUTS + 1):
    return router.depths(score, torch.tensor([tau]), torch.tensor([cap]))


@given(st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([1.0, 1e3, 1e30]))
def test_order_never_rises(outputs, seed, size):
    d = normal(50, outputs, seed=seed) * size
    ordered = router.order(d)
    assert ordered.shape == d.shape and torch.equal(ordered[:, 0], d[:, 0])
    assert (ordered[:, 1:] <= ordered[:, :-1]).all()


def test_order_by_hand():
    ordered = router.order(torch.tensor([[2.0, 0.0, 1.0]])).tolist()[0]
    second = 2 - math.log(2)
    assert ordered == pytest.approx([2, second, second - math.log(1 + math.e)], abs=1e-6)


def test_scores_follow_the_formula():
    x, r = case()
    x64, weight = x.double(), r.weight.double() * r.weight_scale.double()[:, None]
    rms = x64.square().mean(1, keepdim=True).sqrt()
    hidden = (x64 / rms) @ weight.T + rms.log() * r.rms.double() + r.bias.double()
    d = (hidden * torch.sigmoid(hidden)) @ r.out.double().T + r.out_bias.double()
    expected = [d[:, 0]]
    for e in range(1, OUTPUTS):
        expected.append(expected[-1] - (1 + d[:, e].exp()).log())
    assert snr_db(torch.stack(expected, 1), router.scores(x, r)) > 100


@given(st.integers(0, 10**6), st.floats(-20, 20), st.floats(-20, 20), st.integers(1, OUTPUTS + 1))
def test_a_lower_threshold_never_reads_less(seed, one, other, cap):
    x, r = case(seed, 30)
    score = router.scores(x, r)
    low, high = depths(score, min(one, other), cap), depths(score, max(one, other), cap)
    assert (low >= high).all()
    assert high.min() >= 1 and low.max() <= cap


def test_depth_counts_the_open_gates():
    score = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert [depths(score, tau).item() for tau in (3.5, 3.0, 2.5, 1.5, 0.5, -0.5)] == [1, 1, 2, 3, 4, 5]
    assert [depths(score, -0.5, cap).item() for cap in (1, 2, 3, 4, 5)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cap", range(1, OUTPUTS + 2))
def test_no_threshold_reads_the_cap(cap):
    x, r = case()
    assert (depths(router.scores(x, r), -math.inf, cap) == cap).all()
    assert (depths(router.scores(x, r), math.inf, cap) == 1).all()


def test_scores_spread_over_all_depths():
    # the other tests mean nothing where every token reads the same
    x, r = case()
    assert len(depths(router.scores(x, r), 0.0).unique()) >= 3


def test_each_token_may_have_its_own_threshold_and_cap():
    score = router.scores(*case())
    tau, cap = normal(200, seed=1) * 3, torch.randint(1, OUTPUTS + 2, (200,))
    together = router.depths(score, tau, cap)
    alone = [depths(score[t : t + 1], tau[t].item(), cap[t].item()).item() for t in range(200)]
    assert together.tolist() == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tau", [0.0, -math.inf])
def test_a_broken_token_leaves_others_alone(bad, tau):
    x, r = case(tokens=40)
    before = depths(router.scores(x, r), tau)
    x[7, 3] = bad
    after = depths(router.scores(x, r), tau)
    assert 1 <= after[7] <= OUTPUTS + 1
    others = torch.arange(40) != 7
    assert torch.equal(before[others], after[others])


def test_zero_and_empty_input():
    _, r = case()
    assert router.scores(torch.zeros(2, COLUMNS), r).isfinite().all()
    empty = router.scores(torch.zeros(0, COLUMNS), r)
    assert empty.shape == (0, OUTPUTS) and depths(empty, 0.0).shape == (0,)


def test_features_keep_size_apart():
    x, _ = case()
    direction, log_size = router.features(x)
    assert torch.allclose(direction.square().mean(1), torch.ones(200), atol=1e-5)
    assert snr_db(x, direction * log_size.exp()) > 100
    assert router.features(x.half())[0].dtype == torch.float32


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_int8_rounding_is_small(size):
    trained = normal(HIDDEN, COLUMNS, seed=1) * size * torch.logspace(-2, 0, HIDDEN)[:, None]
    zero = torch.zeros(HIDDEN)
    r = router.store(trained, zero, zero, torch.zeros(OUTPUTS, HIDDEN), torch.zeros(OUTPUTS))
    back = r.weight.float() * r.weight_scale.float()[:, None]
    scale = r.weight_scale.float()[:, None]
    # a scale below the normal numbers of fp16 is itself rounded
    slack = 1.01 if size == 1.0 or size == 1e4 else 130.0
    assert ((back - trained).abs() <= scale * 0.5 * slack).all()
    if size >= 1:
        assert all(snr_db(t, b) > 38 for t, b in zip(trained, back, strict=True))


def test_rest_is_stored_as_it_is():
    parts = [normal(HIDDEN, COLUMNS), normal(HIDDEN), normal(HIDDEN), normal(OUTPUTS, HIDDEN), normal(OUTPUTS)]
    r = router.store(*parts)
    kept = [r.rms, r.bias, r.out, r.out_bias]
    assert all(torch.equal(a, b) for a, b in zip(parts[1:], kept, strict=True))
    zero_row = router.store(torch.zeros(2, COLUMNS), *[torch.zeros(2)] * 2, torch.zeros(1, 2), torch.zeros(1))
    assert not zero_row.weight.any() and zero_row.weight_scale.isfinite().all()


@pytest.mark.parametrize("columns, hidden, outputs", [(48, 8, 4), (576, 16, 4), (7, 1, 1)])
def test_sizes_are_those_of_the_tensors(columns, hidden, outputs):
    r = random_router(columns, hidden, outputs)
    told = router.shapes(columns, hidden, outputs)
    assert list(told) == list(vars(r))
    for name, tensor in vars(r).items():
        assert told[name] == (tuple(tensor.shape), tensor.dtype)
    assert router.stored_bits(columns, hidden, outputs) == sum(8 * t.nbytes for t in vars(r).values())


def test_scores_are_exact_under_autocast():
    x, one = case()
    plain = router.scores(x, one)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.scores(x, one), plain)
