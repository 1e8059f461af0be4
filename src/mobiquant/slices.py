"""MoBiSlice: one master code per weight whose prefixes are the quantised weight at every width.

What: a weight group with range [lo, hi] gets one scale `s` and one zero point, and each weight one code `q` of
`B <= 8` bits. The first `B_e` bits of `q` are the code at depth `e`; there is no residual tensor and no recursion.

How (letters as in the package docstring; `b_1` is the width of the base slice):

    s  = (hi - lo) / (2^b_1 - 1)                      fp16, one for each group, shared by all slices
    zi = -lo / s,  z = zi + 1/2                       the half turns rounding into flooring
    q  = clamp(floor((W / s + z) * 2^(B - b_1)), 0, 2^B - 1)
    q_e = q >> (B - B_e)                              the prefix at depth e
    read(q, e) = s * ((q_e + 1/2) / 2^(B_e - b_1) - z)

which equals the shift-and-add form of MoBiQuant (arXiv 2602.20191, section 4.1): a base slice plus residual slices with a
fixed mid-code zero point and the base scale divided by a power of two. `tests/test_slices.py` proves the identities.

Choice: the zero point is stored in 8 bits with a fractional part (`ZERO_BITS`), not as an integer of `b_1` bits. A
symmetric group wants its four base levels at -1.5, -0.5, 0.5, 1.5 steps, which no integer zero point allows; the six extra
bits a group buy more than that many bits anywhere else (`docs/method.md` has the figures). Integer zero points stay exact.

Only torch is used here: no modules, no devices, no configuration objects.
"""

import itertools

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

MAX_BITS = 8
ZERO_BITS = 8
SCALE_BITS = 16
# smallest positive and largest fp16 number: a scale outside them could not be stored
MIN_SCALE, MAX_SCALE = 2.0**-24, 65504.0


def check_slices(slices: tuple[int, ...]) -> None:
    """Raise ValueError unless `slices` are two or more positive widths that sum to at most 8 bits."""
    if len(slices) < 2 or any(width < 1 for width in slices) or sum(slices) > MAX_BITS:
        raise ValueError(
            f"slices {','.join(map(str, slices))} are not usable: give two or more positive widths in bits "
            f"that sum to {MAX_BITS} or less, such as 2,1,1,2,2"
        )


def bounds(slices: tuple[int, ...]) -> tuple[int, ...]:
    """Widths in bits of the prefixes: (2, 1, 1, 2, 2) -> (2, 3, 4, 6, 8)."""
    return tuple(itertools.accumulate(slices))


def depth_for(slices: tuple[int, ...], bits: float) -> int:
    """Number of slices whose widths sum to exactly `bits`; raises ValueError if no prefix has that width."""
    widths = bounds(slices)
    if bits not in widths:
        raise ValueError(f"no prefix of the slices has {bits:g} bits: fixed widths are {', '.join(map(str, widths))}")
    return widths.index(int(bits)) + 1


def groups(columns: int, group_size: int) -> int:
    """Number of groups `ceil(K / g)`; a short last group is legal."""
    return -(-columns // group_size)


def expand(per_group: Float[Tensor, "N G"], group_size: int, columns: int) -> Float[Tensor, "N K"]:
    """Repeat a value of each group over its columns."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def store_scale(scale: Float[Tensor, "N G"]) -> Float16[Tensor, "N G"]:
    """Nearest storable scale: fp16, positive, finite."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).half().clamp(MIN_SCALE, MAX_SCALE)


def store_zero(zero: Float[Tensor, "N G"], slices: tuple[int, ...]) -> UInt8[Tensor, "N G"]:
    """Zero point `zi` in base steps -> its 8-bit code, in units of 2^(b_1 - 8) base steps."""
    return (zero * 2 ** (ZERO_BITS - slices[0])).round().clamp(0, 2**ZERO_BITS - 1).to(torch.uint8)


def load_zero(zero: UInt8[Tensor, "N G"], slices: tuple[int, ...]) -> Float[Tensor, "N G"]:
    """8-bit zero point -> `zi` in base steps, exact in fp32."""
    return zero.float() * 2.0 ** (slices[0] - ZERO_BITS)


def from_range(
    low: Float[Tensor, "N G"], high: Float[Tensor, "N G"], slices: tuple[int, ...]
) -> tuple[Float16[Tensor, "N G"], UInt8[Tensor, "N G"]]:
    """Range of each group -> stored scale and zero point; the range is first widened to hold zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = store_scale((high - low) / (2 ** slices[0] - 1))
    return scale, store_zero(-low / scale.float(), slices)


def position(
    weight: Float[Tensor, "N K"],
    scale: Float16[Tensor, "N G"],
    zero: UInt8[Tensor, "N G"],
    slices: tuple[int, ...],
    group_size: int,
) -> Float[Tensor, "N K"]:
    """`u = W / s + z` in base steps, fp32: the place of each weight on the grid, before flooring."""
    columns = weight.shape[1]
    shift = expand(load_zero(zero, slices) + 0.5, group_size, columns)
    return weight.float() / expand(scale.float(), group_size, columns) + shift


def encode(
    weight: Float[Tensor, "N K"],
    scale: Float16[Tensor, "N G"],
    zero: UInt8[Tensor, "N G"],
    slices: tuple[int, ...],
    group_size: int,
) -> UInt8[Tensor, "N K"]:
    """Quantise to master codes of `sum(slices)` bits by flooring; weights outside the range go to its end cells."""
    total = sum(slices)
    u = position(weight, scale, zero, slices, group_size)
    return (u * 2 ** (total - slices[0])).floor().clamp(0, 2**total - 1).to(torch.uint8)


def prefix(code: UInt8[Tensor, "..."], slices: tuple[int, ...], depth: int) -> UInt8[Tensor, "..."]:
    """`q_e`, the first `B_e` bits of each master code, `e` = depth (1 is the base slice alone)."""
    return code >> (sum(slices) - bounds(slices)[depth - 1])


def level(prefix_code: UInt8[Tensor, "..."] | Int[Tensor, "..."], slices: tuple[int, ...], depth: int) -> Float[Tensor, "..."]:
    """Centre of a prefix cell in base steps, `(q_e + 1/2) / 2^(B_e - b_1)`, exact in fp32."""
    return (prefix_code.float() + 0.5) * 2.0 ** (slices[0] - bounds(slices)[depth - 1])


def dequantize(
    prefix_code: UInt8[Tensor, "N K"],
    scale: Float16[Tensor, "N G"],
    zero: UInt8[Tensor, "N G"],
    slices: tuple[int, ...],
    group_size: int,
    depth: int,
) -> Float[Tensor, "N K"]:
    """Prefix codes of a depth -> fp32 weights `s * (level - z)`."""
    columns, cell = prefix_code.shape[1], 2.0 ** (slices[0] - bounds(slices)[depth - 1])
    # level - z as code * cell - (z - cell / 2): both sides are exact in fp32, so there is one rounding, that by the scale
    value, shift = prefix_code.float().mul_(cell), load_zero(zero, slices) + (0.5 - cell / 2)
    full = columns // group_size
    whole = value[:, : full * group_size].unflatten(1, (full, group_size))  # [N, K] -> [N, G, g], a view
    whole.sub_(shift[:, :full, None]).mul_(scale.float()[:, :full, None])
    if full * group_size < columns:
        value[:, full * group_size :].sub_(shift[:, full:]).mul_(scale.float()[:, full:])
    return value


def read(
    code: UInt8[Tensor, "N K"],
    scale: Float16[Tensor, "N G"],
    zero: UInt8[Tensor, "N G"],
    slices: tuple[int, ...],
    group_size: int,
    depth: int,
) -> Float[Tensor, "N K"]:
    """Master codes -> fp32 weights as a token reads them that fetches the first `depth` slices."""
    return dequantize(prefix(code, slices, depth), scale, zero, slices, group_size, depth)
