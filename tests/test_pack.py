"""Planes hold the codes bit by bit, most significant first, and their first ones are the prefix codes."""

import pytest
import torch
from helpers import SLICES, generator, slice_lists
from hypothesis import given
from hypothesis import strategies as st

from mobiquant import pack
from mobiquant import slices as s


def codes(rows, columns, total, seed=0):
    return torch.randint(0, 2**total, (rows, columns), dtype=torch.uint8, generator=generator(seed))


@given(slice_lists(), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_first_planes_are_the_prefix(slices, rows, columns, seed):
    code = codes(rows, columns, sum(slices), seed)
    planes = pack.pack(code, slices)
    for depth in range(1, len(slices) + 1):
        assert torch.equal(pack.unpack(planes[:depth], columns), s.prefix(code, slices, depth))


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 77])
def test_round_trip(slices, columns):
    code = codes(3, columns, sum(slices))
    # end codes are where a shift or a sign would go wrong
    code[0], code[1, 0] = 2 ** sum(slices) - 1, 0
    assert torch.equal(pack.unpack(pack.pack(code, slices), columns), code)


@given(slice_lists(), st.integers(1, 30))
def test_sizes_are_as_told(slices, columns):
    planes = pack.pack(codes(4, columns, sum(slices)), slices)
    assert [tuple(p.shape) for p in planes] == [pack.plane_shape(4, columns, width) for width in slices]
    assert all(p.dtype == torch.uint8 for p in planes)
    assert sum(p.numel() for p in planes) == sum(slices) * 4 * ((columns + 7) // 8)


@given(slice_lists(), st.integers(1, 30))
def test_cuts_do_not_change_bytes(slices, columns):
    code = codes(2, columns, sum(slices))
    cut_everywhere = pack.pack(code, (1,) * sum(slices))
    assert torch.equal(torch.cat(pack.pack(code, slices)), torch.cat(cut_everywhere))


def test_bits_lie_most_significant_first():
    code = torch.tensor([[0b101, 0b010, 0b111, 0, 0, 0, 0, 0, 0b100], [0, 0, 0, 0, 0, 0, 0, 0b001, 0]], dtype=torch.uint8)
    first, second = pack.pack(code, (2, 1))
    assert first.tolist() == [
        [[0b1010_0000, 0b1000_0000], [0, 0]],
        [[0b0110_0000, 0], [0, 0]],
    ]
    assert second.tolist() == [[[0b1010_0000, 0], [0b0000_0001, 0]]]


def test_codes_of_any_memory_order():
    code = codes(16, 24, 8).T
    assert torch.equal(pack.unpack(pack.pack(code, (2, 1, 1, 2, 2)), 16), code)
