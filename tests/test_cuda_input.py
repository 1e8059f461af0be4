"""Launches of `few.cu` that make their input by the norm or the gate before them: emulated on a CPU, and on a GPU."""

import pytest
import torch
from emulation import DEVICES, emulate
from helpers import normal, random_router, snr_db
from test_cuda import SHUT, between, laid, moved, packed

from mobiquant import router
from mobiquant.kernels.cuda import block, few, tiles

SLICES, BF16 = (2, 1, 1, 2, 2), torch.bfloat16
# columns and group: whole and partly filled groups, more than a turn of the emulated block
SHAPES = [(128, 64), (576, 128), (72, 64), (1544, 64)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        emulate(monkeypatch, abs(hash(request.node.name)))
    return torch.device(request.param)


class Layers:
    """Layers of one input with a router each for this launch and for one to come, as a launch of its own input takes them."""

    def __init__(self, device, columns, group, routed=False, change=lambda one: None):
        self.device, self.columns, self.depths = device, columns, len(SLICES)
        weights = [moved(packed(rows, columns, SLICES, group, seed), device) for seed, rows in enumerate((48, 33))]
        drawn = [random_router(columns, 16, self.depths - 1, seed) for seed in range(2 * routed)]
        self.routers = [router.Router(**{name: part.to(device) for name, part in vars(one).items()}) for one in drawn]
        for one in self.routers:
            change(one)
        laid_out = [tiles.prepare_router(one) for one in self.routers]
        self.group = few.Group([laid(weight) for weight in weights], [None, None], laid_out)

    def vector(self, seed, like=1.0):
        return (like * normal(1, self.columns, seed=seed)).to(BF16).to(self.device)

    def products(self, x, before=None, tau=SHUT):
        read = torch.zeros(1, self.depths, dtype=torch.float64, device=self.device)
        limits = torch.tensor([tau], device=self.device), torch.tensor([self.depths], device=self.device)
        return torch.cat(self.group(x, *limits, read, None, before), 1)

    def same(self, made, wanted):
        # the norm's energy is summed by as many warps on a GPU as in a launch of its own
        return torch.equal(made, wanted) if self.device.type == "cuda" else snr_db(wanted.float(), made.float()) > 45


@pytest.mark.parametrize(("columns", "group"), SHAPES)
@pytest.mark.parametrize("added", [False, True])
def test_a_norm_before_the_products_is_the_norm_of_its_own_launch(device, columns, group, added):
    layers = Layers(device, columns, group)
    hidden, more, weight = layers.vector(1), layers.vector(2) if added else None, layers.vector(3)[0]
    before, total = hidden.clone(), torch.full_like(hidden, float("nan"))
    made = layers.products(hidden, few.Norm(more, weight, total, 1e-5))
    assert torch.equal(hidden, before)
    own = hidden.clone()
    x = block.sum_norm(own, more, weight, 1e-5)
    # the sum is written where there is something to add
    assert torch.equal(total, own) if added else bool(total.isnan().all())
    assert layers.same(made, layers.products(x))
    assert torch.equal(made, layers.products(hidden, few.Norm(more, weight, total, 1e-5)))


@pytest.mark.parametrize(("columns", "group"), [*SHAPES, (4616, 128)])
def test_a_gate_before_the_products_is_the_gate_of_its_own_launch(device, columns, group):
    layers = Layers(device, columns, group)
    gated, up = layers.vector(1, 8.0), layers.vector(2)
    assert torch.equal(layers.products(gated, few.Gate(up)), layers.products(block.gate(gated, up)))


def test_routers_score_what_the_norm_made(device):
    layers = Layers(device, 576, 64, routed=True)
    hidden, more, weight = (layers.vector(seed) for seed in (1, 2, 3))
    x = block.sum_norm(hidden.clone(), more, weight[0], 1e-5)
    scores = [router.scores(x, one) for one in layers.routers]
    tau = between(torch.cat(scores))
    made = layers.products(hidden, few.Norm(more, weight[0], torch.empty_like(hidden), 1e-5), tau)
    most = torch.tensor([layers.depths], device=device)
    for decided, score in zip(layers.group.depths, scores, strict=True):
        assert torch.equal(decided[:1].long(), router.depths(score, torch.tensor([tau], device=device), most))
    assert layers.same(made, layers.products(x, None, tau))


@pytest.mark.parametrize("low", [112, -112, 0])
def test_routers_take_the_size_of_x_from_both_of_its_bytes(device, low):
    # whole numbers of 256 high + low: one column of each group the largest there is, the others alike
    x = torch.full((1, 128), 256.0 * 100 + low, dtype=torch.float16, device=device)
    x[0, ::64] = 256 * 127
    size = x.float().square().mean().sqrt().log()

    def change(one):
        # scores that a thousandth of the size turns round
        for part in vars(one).values():
            part.zero_()
        one.rms.fill_(1000), one.bias.fill_(float(1 - 1000 * size)), one.out[0].fill_(1 / 16)

    layers = Layers(device, 128, 64, True, change)
    for tau, depth in ((0.6, 2), (0.85, 1)):
        layers.products(x, None, tau)
        assert layers.group.depths[:, 0].tolist() == [depth, depth]


def test_nan_in_what_is_added_reaches_the_products(device):
    layers = Layers(device, 128, 64)
    hidden, more, weight = layers.vector(1), layers.vector(2), layers.vector(3)[0]
    more[0, 5] = float("nan")
    assert layers.products(hidden, few.Norm(more, weight, torch.empty_like(hidden), 1e-5)).isnan().all()
    assert layers.products(hidden, few.Gate(more)).isnan().all()


def test_input_is_made_for_one_token(device):
    layers = Layers(device, 128, 64)
    two = torch.cat([layers.vector(1), layers.vector(2)])
    with pytest.raises(ValueError, match="2 tokens of 128 columns: x is made on the way for one"):
        layers.products(two, few.Gate(two[:1]))
