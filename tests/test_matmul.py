"""The mixed-depth product against its fp32 definition, in dB of signal to noise."""

import math

import pytest
import torch
from helpers import SLICES, generator, normal, packed, slice_lists, snr_db
from hypothesis import given
from hypothesis import strategies as st

from mobiquant import slices as s
from mobiquant.matmul import Packed, exact, matmul, reference

# rounding of x, weight and result to the dtype, with room
LEAST_DB = {torch.float32: 110, torch.float16: 55, torch.bfloat16: 38}


def inputs(tokens, columns=40, seed=0):
    return normal(tokens, columns, seed=seed)


def depths_of(tokens, most, seed=0):
    return torch.randint(1, most + 1, (tokens,), generator=generator(seed))


@given(slice_lists(), st.integers(1, 12), st.sampled_from(list(LEAST_DB)), st.integers(1, 50), st.integers(0, 10**6))
def test_mixed_depths(slices, tokens, dtype, columns, seed):
    weight = packed(slices, 9, columns, seed=seed)
    x, depth = inputs(tokens, columns, seed).to(dtype), depths_of(tokens, len(slices), seed)
    y = matmul(x, weight, depth)
    assert y.dtype == dtype and y.shape == (tokens, 9)
    expected = reference(x, weight, depth)
    assert expected.dtype == torch.float32
    # a sum that cancels has less signal than its terms: measure noise against the terms
    terms = torch.stack([x[t].float().abs() @ weight.read(int(d)).abs().T for t, d in enumerate(depth)])
    assert snr_db(terms, terms + (y.double() - expected.double())) > LEAST_DB[dtype]


@pytest.mark.parametrize("dtype", LEAST_DB)
def test_many_tokens(dtype):
    weight, x, depth = packed(rows=64, columns=200, group=64), inputs(100, 200).to(dtype), depths_of(100, 5)
    assert depth.unique().numel() == 5
    assert snr_db(reference(x, weight, depth), matmul(x, weight, depth)) > LEAST_DB[dtype]


def test_reference_is_a_plain_product_of_each_token():
    weight, x, depth = packed(), inputs(20), depths_of(20, 5)
    rows = [x[t].double() @ weight.read(int(depth[t])).double().T for t in range(20)]
    assert snr_db(torch.stack(rows), reference(x, weight, depth)) > 110


@pytest.mark.parametrize("d", range(1, 6))
def test_one_depth_for_all(d):
    weight, x = packed(), inputs(6)
    expected = reference(x, weight, torch.full((6,), d))
    assert snr_db(expected, matmul(x, weight, d)) > 110
    assert torch.equal(matmul(x, weight, torch.full((6,), d)), matmul(x, weight, d))


def test_depths_differ():
    # the other tests mean nothing where a wrong depth would give the same product
    weight, x = packed(), inputs(6)
    near = [snr_db(matmul(x, weight, 5), matmul(x, weight, d)) for d in range(1, 5)]
    assert near == sorted(near) and near[-1] < 60


@pytest.mark.parametrize("deep", [0, 3, 6])
def test_one_token_alone_deep(deep):
    weight, x, depth = packed(), inputs(7), torch.ones(7, dtype=torch.int64)
    depth[deep] = 5
    y = matmul(x, weight, depth)
    assert snr_db(reference(x, weight, depth), y) > 110
    assert snr_db(x[deep] @ weight.read(5).T, y[deep]) > 110


@pytest.mark.parametrize("dtype", LEAST_DB)
def test_no_tokens(dtype):
    weight, x = packed(), torch.zeros(0, 40, dtype=dtype)
    for depth in (3, torch.zeros(0, dtype=torch.int64)):
        y = matmul(x, weight, depth)
        assert y.shape == (0, 24) and y.dtype == dtype
    assert reference(x, weight, torch.zeros(0, dtype=torch.int64)).shape == (0, 24)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_stays_alone(bad):
    weight, x, depth = packed(), inputs(9), torch.tensor([1, 1, 2, 2, 3, 5, 5, 4, 2])
    clean = matmul(x, weight, depth)
    x[3, 5] = bad
    y = matmul(x, weight, depth)
    others = torch.arange(9) != 3
    assert torch.equal(y[others], clean[others])
    assert not y[3].isfinite().any()


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("columns", [5, 40, 48])
def test_first_planes_suffice(slices, columns):
    weight, x = packed(slices, 6, columns), inputs(8, columns)
    for d in range(1, len(slices) + 1):
        part = Packed(weight.planes[:d], weight.scale, weight.zero, slices[:d], weight.group_size, columns)
        assert torch.equal(part.read(d), weight.read(d))
        depth = depths_of(8, d, seed=d)
        depth[0] = d
        assert torch.equal(matmul(x, part, depth), matmul(x, weight, depth))
        assert torch.equal(matmul(x, part, d), matmul(x, weight, d))


def test_gradients_reach_the_input():
    weight, x, depth = packed(), inputs(6).requires_grad_(), torch.tensor([1, 5, 2, 2, 3, 1])
    matmul(x, weight, depth).sum().backward()
    expected = torch.stack([weight.read(int(d)).sum(0) for d in depth])
    assert snr_db(expected, x.grad) > 100


def test_deeper_planes_do_not_matter():
    weight, x, depth = packed(), inputs(4), torch.tensor([1, 3, 2, 3])
    planes = [*weight.planes[:3], *(~plane for plane in weight.planes[3:])]
    other = Packed(planes, weight.scale, weight.zero, weight.slices, weight.group_size, 40)
    assert torch.equal(matmul(x, other, depth), matmul(x, weight, depth))
    assert not torch.equal(matmul(x, other, 4), matmul(x, weight, 4))


@pytest.mark.parametrize("slices", SLICES)
def test_planes_read_like_codes(slices):
    weight = packed(slices)
    full = normal(24, 40)
    code = s.encode(full, weight.scale, weight.zero, slices, 16)
    for d in range(1, len(slices) + 1):
        assert torch.equal(weight.read(d), s.read(code, weight.scale, weight.zero, slices, 16, d))


def test_tokens_of_several_depths_under_autocast():
    weight, x, depth = packed(), inputs(20), depths_of(20, 5)
    with exact(), torch.autocast("cpu", torch.bfloat16):
        made = [matmul(x, weight, d) for d in (depth, 2)]
    assert [y.dtype for y in made] == [torch.bfloat16] * 2
    assert snr_db(reference(x, weight, depth), made[0]) > LEAST_DB[torch.bfloat16]
