"""Average bits to threshold and back, and the accounting of bits."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import layer, normal, slice_lists
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mobiquant import budget, router
from mobiquant.config import Checkpoint, Format, InputError
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear

FORM = Format(slices=(2, 1, 1, 2, 2), group_size=16, router_hidden=4)
INF = math.inf


def table(form):
    """Regions whose share of the range is a sigmoid of -tau / 2 for every cap."""
    regions = []
    for cap in budget.region_caps(form):
        taus = [3.0, 1.0, 0.0, -1.5, -4.0]
        bits = [[read_at(tau, form, c) for c in range(1, cap + 1)] for tau in taus]
        regions.append({"cap": cap, "tau": taus, "bits": bits})
    return tuple(regions)


def read_at(tau, form, cap):
    low, high = form.widths[0], form.widths[cap - 1]
    return low + (high - low) / (1 + math.exp(tau / 2))


class Model(nn.Module):
    """Two layers of one input under one precision, described as a loaded checkpoint is."""

    def __init__(self, form=FORM, thresholds=None, as_dict=False):
        super().__init__()
        self.first, self.second = layer(form, seed=1), layer(form, rows=8, owns_router=False, seed=2)
        precision = Precision(form.widths)
        for one in (self.first, self.second):
            one.attach(precision, self.first)
        stored = Checkpoint(form, (("first", "second"),), (0,), table(form) if thresholds is None else thresholds)
        # transformers hands back an object of its own with a to_dict
        self.config = SimpleNamespace(quantization_config=SimpleNamespace(to_dict=stored.to_dict) if as_dict else stored)

    def forward(self, x):
        return self.first(x), self.second(x)


@given(slice_lists(), st.floats(0, 1), st.floats(0, 1), st.lists(st.floats(0.9, 1.1), min_size=5, max_size=5))
def test_more_bits_never_raise_the_threshold(slices, one, other, noise):
    form, regions = Format(slices=slices), table(Format(slices=slices))
    # a row that was measured may read less than the row above it
    for region in regions:
        region["bits"] = [[b * factor for b in row] for row, factor in zip(region["bits"], noise, strict=True)]
    low, high = form.widths[0], form.widths[-1]
    less, more = sorted(low + (high - low) * share for share in (one, other))
    (tau_less, cap_less), (tau_more, cap_more) = (budget.threshold(b, form, regions) for b in (less, more))
    assert cap_less <= cap_more
    # an end of a region is its cap for every token
    if cap_less == cap_more:
        assert tau_less >= tau_more or cap_less == 1


@pytest.mark.parametrize("bits", [2.1, 2.5, 3, 3.3, 3.9, 4.1, 5, 5.9, 7.5, 7.9])
def test_a_table_straight_on_the_logit_scale_is_met_exactly(bits):
    tau, cap = budget.threshold(bits, FORM, table(FORM))
    assert cap == (3 if bits <= 4 else 4 if bits <= 6 else 5)
    # between rows and beyond the first and last
    assert read_at(tau, FORM, cap) == pytest.approx(bits, abs=1e-6)


def test_rows_are_met_exactly():
    region = {"cap": 3, "tau": [2.0, 0.5, -1.0], "bits": [[2, 2.1, 2.3], [2, 2.4, 2.9], [2, 2.8, 3.7]]}
    for tau, bits in zip(region["tau"], region["bits"], strict=True):
        assert budget.threshold(bits[2], FORM, (region,)) == (pytest.approx(tau, abs=1e-9), 3)


def test_ends_are_exact():
    ends = {2: (-INF, 1), 4: (-INF, 3), 6: (-INF, 4), 8: (-INF, 5)}
    assert {bits: budget.threshold(bits, FORM, table(FORM)) for bits in ends} == ends
    assert budget.threshold(4.0, FORM, table(FORM)[::-1]) == (-INF, 3)


def test_rows_out_of_order_and_equal_rows():
    good = table(FORM)
    shuffled = [{**r, "tau": r["tau"][::-1], "bits": r["bits"][::-1]} for r in good]
    doubled = [{"cap": r["cap"], "tau": [*r["tau"], r["tau"][-1] - 1], "bits": [*r["bits"], r["bits"][-1]]} for r in good]
    for bits in (2.4, 3.5, 3.95, 5.5, 7, 7.9):
        expected = budget.threshold(bits, FORM, good)
        assert budget.threshold(bits, FORM, shuffled) == pytest.approx(expected)
        assert budget.threshold(bits, FORM, doubled) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_all_read_the_same_give_a_number(rows):
    # what a router makes of a model where it gives one score to every token
    region = {"cap": 3, "tau": [0.5 - i for i in range(rows)], "bits": [[2.0, 2.5, 3.0]] * rows}
    tau, cap = budget.threshold(3.5, FORM, (region,))
    assert math.isfinite(tau) and cap == 3


@pytest.mark.parametrize("max_bits, widths", [(3, (2, 3)), (4, (2, 3, 4)), (6, (2, 3, 4, 6)), (7, (2, 3, 4, 6))])
def test_a_load_of_fewer_slices(max_bits, widths):
    form = FORM.truncated(max_bits)
    assert form.widths == widths and form.router_outputs == 4
    for bits in (2.2, 2.9, 3.4, 3.99):
        if bits < widths[-1]:
            tau, cap = budget.threshold(bits, form, table(FORM))
            assert cap == min(len(widths), 3)
            assert read_at(tau, FORM, cap) == pytest.approx(bits, abs=1e-6)
    # the same tokens as a full load, for every budget of the small region
    if max_bits >= 4:
        for bits in (2, 2.2, 3.4, 4):
            assert budget.threshold(bits, form, table(FORM)) == budget.threshold(bits, FORM, table(FORM))
    assert budget.threshold(widths[-1], form, table(FORM)) == (-INF, len(widths))
    with pytest.raises(InputError, match=f"from 2 to {widths[-1]} bits"):
        budget.threshold(widths[-1] + 0.5, form, table(FORM))
    with pytest.raises(InputError, match="fewer than two slices: give 3 or more"):
        FORM.truncated(2.5)


@given(slice_lists())
def test_budgets_up_to_4_bits_never_read_deeper(slices):
    form = Format(slices=slices)
    caps = budget.region_caps(form)
    assert caps == sorted(set(caps)) and caps[-1] == len(slices)
    small = [width for width in form.widths if width <= 4]
    if len(small) < 2:
        return
    for share in (0.01, 0.5, 0.99, 1):
        _, cap = budget.threshold(small[0] + share * (small[-1] - small[0]), form, table(form))
        assert form.widths[cap - 1] == small[-1]


@given(slice_lists())
def test_budgets_above_4_bits_lie_between_two_widths(slices):
    form = Format(slices=slices)
    for cap, edges in budget.regions(form):
        assert edges[-1] == form.widths[cap - 1]
        assert edges[0] <= 4 or edges == list(form.widths[cap - 2 : cap])
        _, found = budget.threshold((edges[-2] + edges[-1]) / 2, form, table(form))
        assert found == cap


def test_bad_budgets_are_refused():
    model = Model()
    for bad in (1.9, 8.01, 0, -1, math.nan, INF):
        with pytest.raises(InputError, match="from 2 to 8 bits"):
            budget.threshold(bad, FORM, table(FORM))
    for bad in (1, 9, [3, 9]):
        with pytest.raises(InputError, match="from 2 to 8 bits"):
            budget.set_precision(model, bad)
    with pytest.raises(InputError, match="fixed widths are 2, 3, 4, 6, 8; leave out the fixed mode to read 5 bits"):
        budget.set_precision(model, 5, routed=False)
    with pytest.raises(InputError, match="no precision was given"):
        budget.set_precision(model, [])
    assert budget.state(model).get() == ([-INF], [5])


def test_without_routers_only_fixed_widths():
    model = Model(thresholds=())
    with pytest.raises(InputError, match="no routers: read a fixed width"):
        budget.set_precision(model, 3)
    budget.set_precision(model, 3, routed=False)
    assert budget.state(model).get() == ([-INF], [2])


def test_a_plain_model_is_refused():
    for call in (budget.state, budget.bits_read, lambda m: budget.set_precision(m, 3)):
        with pytest.raises(InputError, match="Linear is not a mobiquant model"):
            call(nn.Linear(2, 2))


@pytest.mark.parametrize("as_dict", [False, True])
def test_set_precision(as_dict):
    model = Model(as_dict=as_dict)
    assert isinstance(model.second, MobiLinear) and budget.layers(model) == [model.first, model.second]
    budget.set_precision(model, 3.5)
    tau, cap = budget.threshold(3.5, FORM, table(FORM))
    assert budget.state(model).get() == ([pytest.approx(tau, abs=1e-6)], [cap])
    budget.set_precision(model, 6, routed=False)
    assert budget.state(model).get() == ([-INF], [4])
    budget.set_precision(model, [2, 3.5, 8])
    assert budget.state(model).get() == ([-INF, pytest.approx(tau, abs=1e-6), -INF], [1, 3, 5])
    budget.set_precision(model, (8, 2), routed=False)
    assert budget.state(model).get() == ([-INF, -INF], [5, 1])


def test_a_measured_table_reads_what_is_asked():
    model, x = Model(), normal(2, 400, 40)
    score = router.scores(x.reshape(-1, 40), model.first.get_router())
    regions = []
    for cap in budget.region_caps(FORM):
        taus = score[:, : cap - 1].flatten().quantile(torch.linspace(0.98, 0.02, 9)).tolist()
        rows = []
        for tau in taus:
            depth = router.depths(score, torch.tensor([tau]), torch.tensor([cap]))
            shares = torch.bincount(depth - 1, minlength=5) / len(depth)
            rows.append([budget.average_bits(shares.tolist(), FORM.widths, c) for c in range(1, cap + 1)])
        regions.append({"cap": cap, "tau": taus, "bits": rows})
    model.config.quantization_config = Checkpoint(FORM, (("first", "second"),), (0,), tuple(regions))
    for bits in (2, 2.3, 2.7, 3, 3.5, 3.8, 4, 4.5, 5.2, 6, 7, 7.6, 8):
        budget.set_precision(model, bits)
        model(x)
        assert budget.bits_read(model, reset=True) == pytest.approx(bits, abs=0 if bits in (2, 4, 8) else 0.06)


class Stop(Exception):
    """Raised by a test inside a with block."""


@pytest.mark.parametrize("before", [3.3, [2, 5.0, 8], 8])
@pytest.mark.parametrize("inside", [4, 2.7, [3, 4]])
def test_precision_comes_back_after_an_exception(before, inside):
    model = Model()
    budget.set_precision(model, before)
    kept = budget.state(model).get()
    with pytest.raises(Stop), budget.precision(model, inside):
        assert budget.state(model).get() != kept
        raise Stop
    assert budget.state(model).get() == kept
    with budget.precision(model, inside), budget.precision(model, 2, routed=False):
        assert budget.state(model).fixed == 1
    assert budget.state(model).get() == kept
    with pytest.raises(InputError), budget.precision(model, 99):
        pass
    assert budget.state(model).get() == kept


def test_bits_read_are_weighted_by_layer_size():
    model = Model()
    assert math.isnan(budget.bits_read(model))
    with budget.precision(model, 3, routed=False):
        model.first(normal(4, 40))
    with budget.precision(model, 8, routed=False):
        model.second(normal(6, 40))
    assert budget.bits_read(model) == pytest.approx((3 * 4 * 24 + 8 * 6 * 8) / (4 * 24 + 6 * 8))
    assert not math.isnan(budget.bits_read(model, reset=True))
    assert math.isnan(budget.bits_read(model))


def test_average_bits():
    shares = [0.1, 0.2, 0.3, 0.4, 0.0]
    assert budget.average_bits(shares, FORM.widths) == pytest.approx(0.2 + 0.6 + 1.2 + 2.4)
    assert budget.average_bits(shares, FORM.widths, 2) == pytest.approx(0.2 + 2.7)
    assert budget.average_bits(shares, FORM.widths, 1) == pytest.approx(2)
