"""The one number a user moves: average bits <-> threshold, and the accounting of bits.

A checkpoint holds a table made on calibration text (`config.Checkpoint.thresholds`): regions of budgets, each with a depth
cap and rows of a threshold `tau` with the average bits that the routed model then read, for every cap up to that one.
Between rows the share of the range is interpolated on the logit scale, where it is nearly straight in `tau` and cannot
leave the range.

Why regions: a budget of 4 bits or less is routed among the slices of 4 bits or less. A load with `max_bits=4` then gives the
same tokens as a full one, and a device that holds 4 bits serves every budget up to 4. Above 4 bits there is a region between
each two widths: the next slice gains so much less than the one before that no token should read it while others lack that one.
The ends of a region are exact: its cap read by every token.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mobiquant.config import Checkpoint, Format, InputError
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear, mobilinears

SMALL_LOAD_BITS = 4
MARGIN = 1e-4


def region_caps(form: Format) -> list[int]:
    """Depth caps of the regions, ascending: the deepest prefix of at most 4 bits, if it can be routed, and every one above."""
    small = sum(width <= SMALL_LOAD_BITS for width in form.widths)
    return list(range(max(small, 2), len(form.slices) + 1))


def regions(form: Format) -> Iterator[tuple[int, list[int]]]:
    """Cap of each region and the widths from the end of the one before (or the base) to its own: budgets that it serves."""
    below = form.widths[0]
    for cap in region_caps(form):
        edges = [width for width in form.widths[:cap] if width >= below]
        yield cap, edges
        below = edges[-1]


def average_bits(shares: Sequence[float], widths: tuple[int, ...], cap: int | None = None) -> float:
    """Bits of the shares of depths, as they would be with no token deeper than `cap`."""
    cap = cap or len(widths)
    return sum(share * widths[min(d, cap - 1)] for d, share in enumerate(shares))


def _logit(bits: float, low: int, high: int) -> float:
    share = min(max((bits - low) / (high - low), MARGIN), 1 - MARGIN)
    return math.log(share / (1 - share))


def threshold(bits: float, form: Format, thresholds: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """`(tau, cap)` that read `bits` on average on text like the calibration text; -inf where the budget is a whole region."""
    form.check_bits(bits)
    if bits == form.widths[0]:
        return float("-inf"), 1
    regions = sorted(thresholds, key=lambda region: region["cap"])
    for region in regions:
        cap = min(region["cap"], len(form.slices))
        low, high = form.widths[0], form.widths[cap - 1]
        if bits == high:
            return float("-inf"), cap
        if bits < high:
            break
    else:
        raise InputError("this model has no routers: read a fixed width instead (routed=False, --fixed)")
    # rows by rising bits; equal neighbours would leave no slope
    points: list[tuple[float, float]] = []
    for tau, row in sorted(zip(region["tau"], region["bits"], strict=True), reverse=True):
        at = _logit(row[cap - 1], low, high)
        if not points or at > points[-1][0] + 1e-9:
            points.append((at, tau))
    if len(points) == 1:
        # routers that cannot tell tokens apart leave one threshold to choose
        return points[0][1], cap
    target = _logit(bits, low, high)
    i = min(max(sum(at < target for at, _ in points), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (target - x0) / (x1 - x0), cap


def layers(model: nn.Module) -> list[MobiLinear]:
    """The quantised layers of a model; raises InputError where there are none."""
    found = list(mobilinears(model).values())
    if not found:
        raise InputError(f"{type(model).__name__} is not a mobiquant model: quantise it first, or load it with mobiquant.load")
    return found


def state(model: nn.Module) -> Precision:
    """The precision object that all quantised layers of a model share."""
    return layers(model)[0].precision


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """The stored description of a quantised model."""
    layers(model)
    stored = model.config.quantization_config  # type: ignore[union-attr]
    return stored if isinstance(stored, Checkpoint) else Checkpoint.from_dict(stored.to_dict())  # type: ignore[union-attr]


def set_precision(model: nn.Module, bits: float | Sequence[float], *, routed: bool = True) -> None:
    """Read `bits` on average from now on, or exactly `bits` for every token with `routed=False`.

    A sequence of numbers gives each sequence of the batches to come its own budget. Nothing is recompiled or reloaded.
    Raises InputError outside the range of the checkpoint, or for a fixed width that no prefix has.
    """
    stored = checkpoint_of(model)
    every = list(bits) if isinstance(bits, Sequence) else [bits]
    if not every:
        raise InputError("no precision was given: give one number of bits, or one for each sequence of the batch")
    if routed:
        pairs = [threshold(b, stored.format, stored.thresholds) for b in every]
    else:
        pairs = [(float("-inf"), stored.format.depth(b)) for b in every]
    state(model).set([tau for tau, _ in pairs], [cap for _, cap in pairs])


@contextmanager
def precision(model: nn.Module, bits: float | Sequence[float], *, routed: bool = True) -> Iterator[None]:
    """`set_precision` for the length of a with block; the precision before it comes back after it."""
    before = state(model).get()
    set_precision(model, bits, routed=routed)
    try:
        yield
    finally:
        state(model).set(*before)


def bits_read(model: nn.Module, reset: bool = False) -> float:
    """Average bits of a weight that a token read since the last reset, weighted by layer size; nan before any token."""
    shares = state(model).depth_shares(reset)
    return average_bits(shares, state(model).widths) if sum(shares) else float("nan")
