"""The identities of nested codes: every prefix of the master code is the quantised weight of that width."""

import pytest
import torch
from helpers import KINDS, SLICES, normal, quantised, slice_lists, weights
from hypothesis import given
from hypothesis import strategies as st

from mobiquant import clip
from mobiquant import slices as s


def per_column(values, group, columns):
    """[N, G] -> [N, K] fp64, without the code under test."""
    return values.double()[:, torch.arange(columns) // group]


def zero_points(zero, slices):
    """Stored zero points in base steps, fp64."""
    return zero.double() / 2 ** (8 - slices[0])


@given(quantised())
def test_base_is_round_to_nearest(case):
    weight, scale, zero, slices, group = case()
    columns, top = weight.shape[1], 2 ** slices[0] - 1
    whole = zero_points(zero, slices).round().clamp(0, top)
    code = s.encode(weight, scale, s.store_zero(whole, slices), slices, group)
    base = s.prefix(code, slices, 1).double()

    place = weight.double() / per_column(scale, group, columns) + per_column(whole, group, columns)
    nearest = place.round().clamp(0, top)
    # fp32 may land on the other side of a border between two cells
    to_border = (place - place.floor() - 0.5).abs()
    assert (base - nearest).abs().max() <= 1
    assert torch.equal(base[to_border > 1e-4], nearest[to_border > 1e-4])

    read = s.read(code, scale, s.store_zero(whole, slices), slices, group, 1).double()
    expected = per_column(scale, group, columns) * (base - per_column(whole, group, columns))
    assert torch.equal(read, expected.float().double())


@given(quantised())
def test_truncating_is_encoding_at_that_width(case):
    weight, scale, zero, slices, group = case()
    code = s.encode(weight, scale, zero, slices, group)
    for depth, width in enumerate(s.bounds(slices), 1):
        short = s.encode(weight, scale, zero, slices[:depth], group)
        assert torch.equal(s.prefix(code, slices, depth), short)
        assert int(short.max()) < 2**width


@given(quantised())
def test_read_is_a_base_slice_plus_residual_slices(case):
    weight, scale, zero, slices, group = case()
    columns, widths = weight.shape[1], s.bounds(slices)
    code = s.encode(weight, scale, zero, slices, group)
    step = per_column(scale, group, columns)
    prefixes = [(code.long() >> (widths[-1] - width)) for width in widths]
    total = step * (prefixes[0] - per_column(zero_points(zero, slices), group, columns))
    assert torch.equal(s.read(code, scale, zero, slices, group, 1), total.float())
    for e in range(1, len(slices)):
        residual = prefixes[e] - 2 ** slices[e] * prefixes[e - 1]
        assert residual.min() >= 0 and residual.max() < 2 ** slices[e]
        total = total + step * 2.0 ** (slices[0] - widths[e]) * (residual - (2 ** slices[e] - 1) / 2)
        # the sum is exact in fp64 and read() rounds once
        assert torch.equal(s.read(code, scale, zero, slices, group, e + 1), total.float())


@given(quantised())
def test_error_is_at_most_half_a_cell(case):
    weight, scale, zero, slices, group = case()
    columns = weight.shape[1]
    step = per_column(scale, group, columns)
    place = weight.double() / step + per_column(zero_points(zero, slices), group, columns) + 0.5
    inside = (place >= 0) & (place <= 2 ** slices[0])
    code = s.encode(weight, scale, zero, slices, group)
    for depth, width in enumerate(s.bounds(slices), 1):
        error = (s.read(code, scale, zero, slices, group, depth).double() - weight.double()).abs()
        half = step / 2 ** (width - slices[0] + 1)
        assert (error <= half * (1 + 1e-4))[inside].all()


@given(quantised(kinds=[k for k in KINDS if k not in ("tiny", "zero")]))
def test_full_range_clips_nothing(case):
    weight, scale, zero, slices, group = case()
    place = s.position(weight, scale, zero, slices, group)
    assert place.min() >= 0 and place.max() <= 2 ** slices[0]


@given(quantised(), st.sampled_from([1e-30, 1.0, 1e9]))
def test_extreme_weights_stay_finite(case, factor):
    weight, _, _, slices, group = case()
    scale, zero = clip.min_max(weight * factor, slices, group)
    assert scale.dtype == torch.float16 and zero.dtype == torch.uint8
    assert scale.isfinite().all() and (scale > 0).all()
    code = s.encode(weight * factor, scale, zero, slices, group)
    for depth in range(1, len(slices) + 1):
        assert s.read(code, scale, zero, slices, group, depth).isfinite().all()


@pytest.mark.parametrize("slices", SLICES)
def test_zero_weights_read_as_zero(slices):
    weight = weights("zero", 3, 20)
    scale, zero = clip.min_max(weight, slices, 8)
    code = s.encode(weight, scale, zero, slices, 8)
    for depth in range(1, len(slices) + 1):
        assert s.read(code, scale, zero, slices, 8, depth).abs().max() <= s.MIN_SCALE
    assert not s.read(code, scale, zero, slices, 8, 1).any()


@pytest.mark.parametrize("slices", [x for x in SLICES if x[0] < 7])
def test_mean_residual_is_zero(slices):
    weight = normal(64, 512, seed=3)
    scale, zero = clip.min_max(weight, slices, 64)
    code = s.encode(weight, scale, zero, slices, 64)
    widths = s.bounds(slices)
    for e in range(len(slices)):
        error = (s.read(code, scale, zero, slices, 64, e + 1) - weight) / s.expand(scale.float(), 64, 512)
        cell = 2.0 ** (slices[0] - widths[e])
        assert abs(error.mean()) < 0.02 * cell
        if e:
            residual = s.prefix(code, slices, e + 1) - (s.prefix(code, slices, e) << slices[e])
            assert abs(residual.double().mean() - (2 ** slices[e] - 1) / 2) < 0.02 * 2 ** slices[e]


@given(quantised())
def test_groups_do_not_touch_each_other(case):
    weight, scale, zero, slices, group = case()
    code = s.encode(weight, scale, zero, slices, group)
    full = s.read(code, scale, zero, slices, group, len(slices))
    assert scale.shape[1] == s.groups(weight.shape[1], group)
    for i in range(scale.shape[1]):
        part, own = slice(i * group, (i + 1) * group), slice(i, i + 1)
        alone = s.encode(weight[:, part], scale[:, own], zero[:, own], slices, group)
        assert torch.equal(alone, code[:, part])
        assert torch.equal(s.read(alone, scale[:, own], zero[:, own], slices, group, len(slices)), full[:, part])
        low, high = weight[:, part].amin(1), weight[:, part].amax(1)
        expected = s.from_range(low[:, None], high[:, None], slices)
        assert torch.equal(expected[0], scale[:, own]) and torch.equal(expected[1], zero[:, own])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_read_is_fp32_under_any_default_dtype(default):
    weight = normal(4, 24)
    scale, zero = clip.min_max(weight, (2, 2, 2, 2), 8)
    code = s.encode(weight, scale, zero, (2, 2, 2, 2), 8)
    expected = s.read(code, scale, zero, (2, 2, 2, 2), 8, 4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        value = s.read(code, scale, zero, (2, 2, 2, 2), 8, 4)
    finally:
        torch.set_default_dtype(before)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@given(slice_lists())
def test_level_is_the_middle_of_the_cell(slices):
    for depth, width in enumerate(s.bounds(slices), 1):
        codes = torch.arange(2**width)
        cell = 2.0 ** (slices[0] - width)
        assert torch.equal(s.level(codes, slices, depth).double(), codes.double() * cell + cell / 2)


@given(slice_lists())
def test_zero_points_survive_storage(slices):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(s.store_zero(s.load_zero(codes, slices), slices), codes)
    whole = torch.arange(2 ** slices[0], dtype=torch.float32)[None]
    assert torch.equal(s.load_zero(s.store_zero(whole, slices), slices), whole)
    unit = 2.0 ** (slices[0] - s.ZERO_BITS)
    free = torch.linspace(0, 2 ** slices[0] - unit, 999)[None]
    assert (s.load_zero(s.store_zero(free, slices), slices) - free).abs().max() <= unit / 2
    outside = torch.tensor([[-3.0, 1e6]])
    assert s.store_zero(outside, slices).tolist() == [[0, 255]]


def test_range_is_widened_to_hold_zero():
    scale, zero = s.from_range(torch.tensor([[0.5, -0.9]]), torch.tensor([[0.9, -0.6]]), (2, 2))
    assert torch.allclose(scale.double(), torch.tensor([[0.3, 0.3]], dtype=torch.float64), rtol=1e-3)
    assert s.load_zero(zero, (2, 2))[0, 0] == 0
    assert abs(s.load_zero(zero, (2, 2))[0, 1] - 3) < 0.02


@pytest.mark.parametrize("slices", [(), (8,), (2,), (0, 8), (2, -1, 3), (4, 4, 1), (2, 2, 2, 2, 1)])
def test_unusable_slices_are_refused(slices):
    with pytest.raises(ValueError, match="are not usable: give two or more"):
        s.check_slices(slices)


@given(slice_lists())
def test_every_prefix_has_a_depth(slices):
    s.check_slices(slices)
    assert [s.depth_for(slices, bits) for bits in s.bounds(slices)] == list(range(1, len(slices) + 1))
    assert s.depth_for(slices, float(slices[0])) == 1


@pytest.mark.parametrize("bits", [0, 1, 2.5, 5, 7, 9, -2, float("nan"), float("inf")])
def test_a_width_between_prefixes_is_refused(bits):
    with pytest.raises(ValueError, match="fixed widths are 2, 3, 4, 6, 8"):
        s.depth_for((2, 1, 1, 2, 2), bits)
