"""The quantised layer: dense products at the precision it is told, one precision and one router for many layers."""

import copy
import math

import pytest
import torch
from helpers import layer, normal, random_router, snr_db
from torch import nn

from mobiquant import clip, matmul, router
from mobiquant import slices as s
from mobiquant.config import Format
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear

FORM = Format(slices=(2, 1, 1, 2, 2), group_size=16, router_hidden=4)
INF = math.inf


def dense(made, x, depth):
    """What the layer must give where every token reads `depth`, in fp64."""
    y = x.double() @ made.packed().read(depth).double().T
    return y if made.bias is None else y + made.bias.double()


def family(form=FORM):
    """Three layers of one input; the first owns the router."""
    made = nn.ModuleList(layer(form, rows=rows, owns_router=i == 0, seed=i) for i, rows in enumerate((24, 8, 40)))
    precision = Precision(form.widths)
    for one in made:
        one.attach(precision, made[0])
    return made


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_fixed_depth_is_a_dense_product(depth, bias):
    made, x = layer(FORM, bias=bias), normal(2, 3, 40)
    made.precision.set([-INF], [depth])
    y = made(x)
    assert y.shape == (2, 3, 24) and y.dtype == x.dtype
    assert snr_db(dense(made, x, depth), y) > 110


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40), (2, 3, 2, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("tau", [-INF, 0.0])
def test_any_leading_shape(shape, tau):
    made, x = layer(FORM, bias=torch.float32), normal(*shape)
    made.precision.set([tau], [5])
    y = made(x)
    assert y.shape == (*shape[:-1], 24)
    assert torch.allclose(y.reshape(-1, 24), made(x.reshape(-1, 40)), atol=1e-5)


@pytest.mark.parametrize("dtype, least", [(torch.float16, 50), (torch.bfloat16, 35)])
def test_result_has_the_dtype_of_the_input(dtype, least):
    made, x = layer(FORM, bias=torch.float32), normal(30, 40).to(dtype)
    made.precision.set([-INF], [5])
    assert made(x).dtype == dtype
    assert snr_db(dense(made, x, 5), made(x)) > least


def test_routed_tokens_read_their_own_depth():
    made, x = layer(FORM, bias=torch.float32), normal(60, 40)
    made.precision.set([0.0], [4])
    depth = made.depths(x, 1)
    assert len(depth.unique()) >= 3 and depth.max() == 4
    expected = torch.stack([dense(made, x[t], int(d)) for t, d in enumerate(depth)])
    assert snr_db(expected, made(x)) > 110


@pytest.mark.parametrize(
    "tau, cap",
    [([-INF, 0.0, 1.0], [2, 5, 4]), ([-INF] * 3, [1, 5, 3]), ([0.5, 0.5, -2.0], [5, 5, 5]), ([-INF] * 3, [4, 4, 4])],
)
def test_each_sequence_has_its_own_precision(tau, cap):
    made, x = layer(FORM, bias=torch.float32), normal(3, 7, 40)
    alone = []
    for i in range(3):
        made.precision.set([tau[i]], [cap[i]])
        alone.append(made(x[i : i + 1]))
    made.precision.set(tau, cap)
    assert snr_db(torch.cat(alone), made(x)) > 110
    # the order of sequences is that of the batch
    made.precision.set(tau[::-1], cap[::-1])
    assert snr_db(torch.cat(alone[::-1]), made(x.flip(0))) > 110


def test_tokens_may_come_flattened():
    made, x = layer(FORM), normal(3, 5, 40)
    made.precision.set([0.0, -INF, 0.5], [5, 2, 3])
    assert torch.equal(made(x.reshape(15, 40)), made(x).reshape(15, -1))


@pytest.mark.parametrize("shape", [(2, 5, 40), (5, 40), (4, 40), (4, 5, 40), (1, 3, 40)])
@pytest.mark.parametrize("tau", [-INF, 0.0])
def test_another_batch_size_is_refused(shape, tau):
    made = layer(FORM)
    made.precision.set([tau, tau, tau], [1, 2, 3])
    with pytest.raises(ValueError, match="set for 3 sequences and the batch has"):
        made(normal(*shape))


def test_a_change_keeps_the_device_tensors():
    precision, cpu = Precision(FORM.widths), torch.device("cpu")
    tau, cap = precision.on(cpu)
    precision.set([0.25], [3])
    again = precision.on(cpu)
    assert again[0] is tau and again[1] is cap
    assert (tau.tolist(), cap.tolist()) == ([0.25], [3]) == precision.get()
    precision.set([0.5, -INF], [3, 2])
    assert [t.tolist() for t in precision.on(cpu)] == [[0.5, -INF], [3, 2]]
    # what was handed out before belongs to one sequence and stays as it was
    assert tau.tolist() == [0.25]
    precision.set([1.0], [5])
    assert [t.tolist() for t in precision.on(cpu)] == [[1.0], [5]]


def test_a_change_works_after_inference_mode():
    made, x = layer(FORM), normal(4, 40)
    with torch.inference_mode():
        made.precision.set([0.0], [5])
        made(x)
    made.precision.set([0.5], [3])
    assert [t.tolist() for t in made.precision.on(x.device)] == [[0.5], [3]]
    made(x)
    assert sum(made.precision.depth_shares()) == pytest.approx(1)


def test_a_layer_made_without_data_has_a_precision():
    with torch.device("meta"):
        made = MobiLinear(40, 24, FORM, router_columns=40)
    assert made.planes_0.is_meta
    assert made.precision.get() == ([-INF], [5])


def test_a_change_shows_at_once():
    made, x = layer(FORM), normal(4, 40)
    for depth in (5, 1, 3):
        made.precision.set([-INF], [depth])
        assert snr_db(dense(made, x, depth), made(x)) > 110


def test_fixed_depths_are_counted_exactly():
    made = family()
    assert made[0].precision.depth_shares() == [0.0] * 5
    for one, depth, tokens in zip(made, (1, 3, 5), (7, 5, 3), strict=True):
        one.precision.set([-INF], [depth])
        one(normal(1, tokens, 40))
    counts = [7 * 24, 0, 5 * 8, 0, 3 * 40]
    assert made[1].precision.depth_shares() == [c / sum(counts) for c in counts]


def test_mixed_depths_are_counted_exactly():
    made, counts = family(), [0] * 5
    made[0].precision.set([0.0, -INF], [5, 2])
    for i, one in enumerate(made):
        x = normal(2, 11, 40, seed=i)
        for d in one.depths(x.reshape(-1, 40), 2).tolist():
            counts[d - 1] += one.in_features * one.out_features
        one(x)
    by_entry = made[0].precision.entry_counts()
    assert by_entry.sum(0).tolist() == counts and by_entry[1, 2:].sum() == 0 and by_entry.sum(1).unique().numel() == 1
    made[0].precision.set([-INF], [4])
    made[1](normal(3, 40))
    counts[3] += 3 * 40 * 8
    assert min(counts) > 0
    assert made[2].precision.depth_shares(reset=True) == [c / sum(counts) for c in counts]
    assert made[2].precision.depth_shares() == [0.0] * 5


def test_counts_of_large_layers_are_exact():
    precision, size = Precision(FORM.widths), 2**24 + 1
    precision.record(torch.tensor([1]), 1, size)
    precision.record(2, 1, size)
    assert precision.depth_shares() == [0.5, 0.5, 0, 0, 0]


def test_counts_do_not_depend_on_the_default_dtype():
    precision = Precision(FORM.widths)
    torch.set_default_dtype(torch.float16)
    try:
        precision.record(torch.tensor([1, 1, 1, 2]), 4, 4096 * 4096)
    finally:
        torch.set_default_dtype(torch.float32)
    assert precision.depth_shares() == [0.75, 0.25, 0, 0, 0]


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casts_leave_stored_tensors_alone(cast):
    made, x = layer(FORM, bias=torch.float32), normal(9, 40)
    made.precision.set([0.0], [5])
    stored, depth, y = copy.deepcopy(made.state_dict()), made.depths(x, 1), made(x)
    # through a parent, as a model does it
    cast(nn.Sequential(made))
    for name, tensor in made.state_dict().items():
        if name != "bias":
            assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])
    assert made.bias.dtype != torch.float32
    assert torch.equal(made.depths(x, 1), depth)
    assert snr_db(y, made(x)) > 45


def test_followers_read_the_depths_of_the_owner():
    made, x = family(), normal(50, 40)
    made[0].precision.set([0.0], [5])
    first = made[0].depths(x, 1)
    assert len(first.unique()) >= 3
    for one in made[1:]:
        assert not one.router_names and one.owner is made[0]
        assert torch.equal(one.depths(x, 1), first)
    # no tensor is listed twice
    assert sum(name.endswith("router_weight") for name in made.state_dict()) == 1


def ahead():
    """Layers of two inputs, 40 and 24 columns, whose routers read the first one."""
    first, second, later = layer(FORM), layer(FORM, seed=2), MobiLinear(24, 16, FORM, router_columns=40)
    weight = normal(16, 24, seed=7)
    scale, zero = clip.min_max(weight, FORM.slices, FORM.group_size)
    later.set_weight(s.encode(weight, scale, zero, FORM.slices, FORM.group_size), scale, zero, None)
    later.set_router(random_router(40, FORM.router_hidden, FORM.router_outputs, seed=9))
    precision = Precision(FORM.widths)
    first.attach(precision, first)
    second.attach(precision, second, 1, first)
    later.attach(precision, later, 2, first)
    return nn.ModuleList([first, second, later])


def test_routers_that_read_the_first_input_decide_when_it_comes():
    made, x, y = ahead(), normal(50, 40), normal(50, 24, seed=3)
    made[0].precision.set([0.0], [4])
    for one, other in zip(made, (x, normal(50, 40, seed=5), y), strict=True):
        wanted = router.depths(router.scores(x, one.get_router()), torch.tensor([0.0]), torch.tensor([4]))
        assert torch.equal(one.depths(other, 1), wanted) and len(wanted.unique()) >= 3
    assert snr_db(matmul.reference(y, made[2].packed(), wanted), made[2](y)) > 45
    # sequences of a batch keep their own limits
    made[0].precision.set([0.0, -INF], [4, 2])
    made[0](x.view(2, 25, 40))
    depth = made[2].depths(y, 2)
    assert torch.equal(depth[:25], wanted[:25]) and depth[25:].tolist() == [2] * 25


def test_the_router_for_the_next_block_decides_for_its_first_layer():
    first, following = MobiLinear(40, 24, FORM, 40, next_place=4), MobiLinear(40, 8, FORM)
    precision, x = Precision(FORM.widths), normal(50, 40)
    first.attach(precision, first)
    following.attach(precision, following, 4)
    for seed, ahead in ((0, False), (3, True)):
        first.set_router(random_router(40, FORM.router_hidden, FORM.router_outputs, seed), ahead)
    precision.set([0.0], [5])
    # asked twice, it says the same
    for _ in range(2):
        own, told = first.depths(x, 1), following.depths(normal(50, 40, seed=1), 1)
        for made, ahead in ((own, False), (told, True)):
            score = router.scores(x, first.get_router(ahead))
            assert torch.equal(made, router.depths(score, torch.tensor([0.0]), torch.tensor([5])))
    assert not torch.equal(own, told) and not following.router_names
    assert sum(name.startswith("router_next_") for name in first.state_dict()) == 6


@pytest.mark.parametrize("what", ["nothing", "other tokens", "another precision"])
def test_a_layer_whose_tokens_nobody_decided_about_says_so(what):
    made, x, y = ahead(), normal(50, 40), normal(50, 24)
    made[0].precision.set([0.0], [5])
    if what != "nothing":
        made[0](x[:20] if what == "other tokens" else x)
    if what == "another precision":
        made[0].precision.set([0.1], [5])
    with pytest.raises(RuntimeError, match="50 tokens come to a layer, and no layer before it has decided"):
        made[2](y)
    made[0].precision.set([-INF], [2])
    made[2](y)


def test_deepcopy_keeps_what_layers_share():
    made, x = family(), normal(50, 40)
    made[0].precision.set([0.0], [5])
    expected = [one(x) for one in made]
    twin = copy.deepcopy(made)
    assert all(one.owner is twin[0] for one in twin)
    assert all(one.precision is twin[0].precision for one in twin)
    assert twin[0].precision is not made[0].precision
    assert all(torch.equal(one(x), y) for one, y in zip(twin, expected, strict=True))
    twin[0].precision.set([-INF], [1])
    twin[0].router_bias.add_(5)
    assert all(torch.equal(one(x), y) for one, y in zip(made, expected, strict=True))


def test_a_truncated_layer_reads_like_the_full_one():
    full, short = layer(FORM), MobiLinear(40, 24, FORM.truncated(4), router_columns=40)
    kept = {name: tensor for name, tensor in full.state_dict().items() if name not in ("planes_3", "planes_4")}
    short.load_state_dict(kept, strict=True)
    assert short.get_router().out.shape == (2, FORM.router_hidden)
    x = normal(50, 40)
    for tau in (-INF, 0.0):
        full.precision.set([tau], [3])
        short.precision.set([tau], [3])
        assert torch.equal(short(x), full(x))


def test_buffers_are_the_stored_tensors():
    made = layer(FORM, bias=torch.bfloat16)
    names = {name: (tuple(t.shape), t.dtype) for name, t in made.state_dict().items() if "router" not in name}
    assert names == {
        **{f"planes_{e}": ((width, 24, 5), torch.uint8) for e, width in enumerate(FORM.slices)},
        "scale": ((24, 3), torch.float16),
        "zero": ((24, 3), torch.uint8),
        "bias": ((24,), torch.bfloat16),
    }
    assert not list(made.parameters())
